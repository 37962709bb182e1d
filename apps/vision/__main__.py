"""`python -m apps.vision`."""

from apps.cli import run
from apps.vision import APP

if __name__ == "__main__":
    run(APP)
