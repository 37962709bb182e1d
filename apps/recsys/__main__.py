"""`python -m apps.recsys`."""

from apps.cli import run
from apps.recsys import APP

if __name__ == "__main__":
    run(APP)
