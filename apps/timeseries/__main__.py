"""`python -m apps.timeseries`."""

from apps.cli import run
from apps.timeseries import APP

if __name__ == "__main__":
    run(APP)
