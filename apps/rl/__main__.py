"""`python -m apps.rl`."""

from apps.cli import run
from apps.rl import APP

if __name__ == "__main__":
    run(APP)
