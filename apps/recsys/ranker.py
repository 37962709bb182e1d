"""Ranking models in Python: load one, hand it a DataFrame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from apps.recsys.loading import Trained, load_trained
from apps.recsys.prediction import rank_frame, score_frame
from apps.runs import Runs


class Recommender:
    """A trained model that takes and gives DataFrames; the same as `python -m apps.recsys predict`.

    Example:
        >>> import pandas as pd
        >>> from apps.recsys.ranker import Recommender
        >>> recommender = Recommender.from_checkpoint("last")  # the newest run below runs/
        >>> df = pd.read_csv("candidates.csv")  # the features of the model; labels are not needed
        >>> scores = recommender.predict(df)
        >>> best = recommender.rank(df, top=20)
    """

    def __init__(self, trained: Trained) -> None:
        self.trained = trained

    @classmethod
    def from_checkpoint(cls, path: str | Path, root: str = "runs") -> Recommender:
        """From a checkpoint, a run folder, or "last" for the newest run below `root`.

        Raises:
            UserError: if there is none, or it is of another app.
        """
        return cls(load_trained(Runs(root, "recsys").checkpoint(str(path), None)))

    @property
    def tasks(self) -> list[str]:
        """Names of the tasks, in the order of their columns."""
        return [task.name for task in self.trained.spec.tasks]

    def predict(self, df: pd.DataFrame | Sequence[Mapping[str, Any]] | Mapping[str, Sequence[Any]]) -> pd.DataFrame:
        """Score every row.

        Args:
            df: with the feature columns of the model's schema, or what makes a `pandas.DataFrame` (dictionaries of
                rows, or of columns); ids never seen are scored too.

        Returns:
            The columns of user, item and time that the schema names (all columns if it names none), and a probability
            `p_<task>` per task, conditions included; rows and index as given.

        Raises:
            UserError: a column is missing, or a value cannot be what the schema says.
        """
        return score_frame(self.trained, pd.DataFrame(df))

    def rank(self, df: pd.DataFrame, top: int = 20, by: str | None = None) -> pd.DataFrame:
        """The best candidates of every user.

        Args:
            df: as for `predict`; every row is a candidate for its user.
            top: candidates to keep of each user.
            by: task to rank by; None: the first.

        Returns:
            The columns of `predict`, and `rank` from 1; users in order, the best of each first.

        Raises:
            UserError: the schema names no user, there is no such task, or the table cannot be scored.
        """
        return rank_frame(self.trained, self.predict(df), top, by)
