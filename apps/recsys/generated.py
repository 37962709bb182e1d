"""A generated log of which all is known: what users do follows planted probabilities, which come with every row.

Users, items and authors have hidden tastes. What a user is shown is popular or to their taste. Then each step depends
on the one before: click, long view of what was clicked, like of what was viewed long, follow after a like. Watching
(click, long view) and interacting (like, follow) each have tastes of their own, which are related.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from apps.recsys.schema import FeatureSpec, LabelSpec, Schema

TASKS = ("click", "long_view", "like", "follow")
BAYES = "bayes_{}"
"""Column with the true probability of a task, all conditions included: what no model can beat on average."""
CATEGORIES = ("comedy", "food", "games", "music", "news", "pets", "sports", "travel")
CITIES = tuple(f"city{i:02d}" for i in range(30))
DEVICES = ("phone", "tablet", "tv")
DAYS, TASTES, HISTORY = 14, 3, 30
START = 1_700_006_400
"""First second of the log, a midnight (UTC)."""

Rng = np.random.Generator


@dataclass(frozen=True)
class World:
    """Users and items; hidden traits and columns."""

    users: pd.DataFrame
    items: pd.DataFrame
    activity: Float[np.ndarray, " U"]
    """Share of the log."""
    popularity: Float[np.ndarray, " I"]
    taste: Float[np.ndarray, "U 2 K"]
    """Of users for watching and for interacting."""
    style: Float[np.ndarray, "I 2 K"]
    mood: Float[np.ndarray, "U 4"]
    """How readily a user does each step."""
    quality: Float[np.ndarray, "I 4"]


def generate(rows: int = 200_000, seed: int = 0) -> pd.DataFrame:
    """Draw a log, ordered by time.

    Args:
        rows: impressions; there is a user for every 50 of them, and an item for every 100.
        seed: of the draw.

    Returns:
        Columns of `generated_schema`, and `bayes_<task>` for each task.
    """
    rng = np.random.default_rng([seed, 20240501])
    world = _world(max(20, rows // 50), max(20, rows // 100), rng)
    user = rng.choice(len(world.users), rows, p=world.activity)
    item = _shown(world, user, rng)
    time = START + np.sort(rng.integers(0, DAYS * 86400, rows))
    frame = pd.DataFrame({"time": time, "user_id": user + 1000, "item_id": item + 500, "hour": time // 3600 % 24})
    frame["position"] = np.minimum(rng.geometric(0.15, rows), 20)
    for table, row in ((world.users, user), (world.items, item)):
        for name in table.columns:
            frame[name] = table[name].to_numpy()[row]
    chances = _chances(world, frame, user, item)
    draws = rng.random(chances.shape) < chances
    frame[list(TASKS)] = np.logical_and.accumulate(draws, axis=1).astype(np.int8)
    frame[[BAYES.format(task) for task in TASKS]] = np.cumprod(chances, axis=1)
    return frame


def generated_schema() -> Schema:
    """What the columns of the generated log mean."""
    sparse = ("user_id", "item_id", "author_id", "category", "city", "gender", "device", "hour")
    features = {name: FeatureSpec() for name in sparse}
    features |= {name: FeatureSpec(kind="dense") for name in ("age", "duration", "position")}
    features["tags"] = FeatureSpec(kind="sequence", max_len=4)
    features["history"] = FeatureSpec(
        kind="sequence", share="item_id", max_len=HISTORY, pooling="target", target="item_id"
    )
    conditions = dict(zip(TASKS[1:], TASKS[:-1], strict=True))
    labels = {
        task: LabelSpec(group="watch" if i < 2 else "interact", given=conditions.get(task))
        for i, task in enumerate(TASKS)
    }
    return Schema(features, labels, user="user_id", item="item_id", time="time")


def _world(users: int, items: int, rng: Rng) -> World:
    authors = max(5, items // 4)
    author = rng.choice(authors, items, p=_long_tail(authors, 0.8, rng))
    category = rng.integers(0, len(CATEGORIES), authors)[author]
    base = rng.normal(size=(len(CATEGORIES), 2, TASTES))[category] + rng.normal(size=(authors, 2, TASTES))[author]
    style = (base + 0.5 * rng.normal(size=base.shape)) / 1.5
    city = rng.choice(len(CITIES), users, p=_long_tail(len(CITIES), 1.0, rng))
    taste = 0.8 * rng.normal(size=(len(CITIES), 2, TASTES))[city] + 0.6 * rng.normal(size=(users, 2, TASTES))
    taste[:, 1] = 0.6 * taste[:, 0] + 0.8 * taste[:, 1]  # tastes of the two groups are related
    activity, popularity = _long_tail(users, 0.7, rng), _long_tail(items, 0.9, rng)
    item_columns = pd.DataFrame(
        {
            "author_id": author + 1,
            "category": np.array(CATEGORIES, object)[category],
            "duration": np.where(rng.random(items) < 0.03, np.nan, np.exp(rng.normal(3.5, 0.9, items)).round(1)),
            "tags": _tags(category, rng),
        }
    )
    user_columns = pd.DataFrame(
        {
            "age": np.where(rng.random(users) < 0.1, np.nan, np.clip(rng.normal(33, 12, users), 14, 80).round()),
            "gender": np.array(["f", "m", None], object)[rng.choice(3, users, p=(0.47, 0.47, 0.06))],
            "city": np.array(CITIES, object)[city],
            "device": np.array(DEVICES, object)[rng.choice(3, users, p=(0.8, 0.12, 0.08))],
        }
    )
    mood = rng.normal(size=(users, 4)) * (0.4, 0.3, 0.4, 0.4)
    quality = rng.normal(size=(items, 4)) * (0.5, 0.5, 0.4, 0.3) + 0.3 * np.log(popularity * items + 0.1)[:, None]
    world = World(user_columns, item_columns, activity, popularity, taste, style, mood, quality)
    user_columns["history"] = _histories(world, rng)
    return world


def _long_tail(count: int, exponent: float, rng: Rng) -> Float[np.ndarray, " count"]:
    """Shares that fall with a power of the rank, in random order."""
    weights = rng.permutation(np.arange(1, count + 1, dtype=float) + 3) ** -exponent
    return weights / weights.sum()


def _tags(category: Int[np.ndarray, " I"], rng: Rng) -> np.ndarray:
    """One to three tags of the category as text; a few items have none."""
    own = category[:, None] * 5 + rng.integers(0, 5, (len(category), 3))
    counts = rng.choice(4, len(category), p=(0.03, 0.4, 0.35, 0.22))
    text = [",".join(f"t{tag}" for tag in dict.fromkeys(row[:n])) for row, n in zip(own.tolist(), counts, strict=True)]
    return np.array([one or None for one in text], object)


def _histories(world: World, rng: Rng) -> np.ndarray:
    """Items that users viewed long before the log begins; a tenth of the users is new and has none."""
    users = len(world.activity)
    length = np.minimum(rng.poisson(8 * np.sqrt(world.activity * users)), HISTORY)
    length[rng.random(users) < 0.1] = 0
    who = np.repeat(np.arange(users), length)
    what = _to_taste(world, who, rng) + 500
    parts = np.empty(users, object)
    parts[:] = np.split(what, np.cumsum(length)[:-1])
    return parts


def _to_taste(world: World, user: Int[np.ndarray, " N"], rng: Rng) -> Int[np.ndarray, " N"]:
    """For each user, the one of eight popular items that is most to their taste."""
    offers = rng.choice(len(world.popularity), (len(user), 8), p=world.popularity)
    fit = np.einsum("nk,nok->no", world.taste[user, 0], world.style[offers, 0])
    return offers[np.arange(len(user)), (fit + rng.gumbel(size=fit.shape)).argmax(1)]


def _shown(world: World, user: Int[np.ndarray, " N"], rng: Rng) -> Int[np.ndarray, " N"]:
    """Half of what is shown is popular, half is to the user's taste."""
    popular = rng.choice(len(world.popularity), len(user), p=world.popularity)
    return np.where(rng.random(len(user)) < 0.5, popular, _to_taste(world, user, rng))


def _chances(
    world: World, frame: pd.DataFrame, user: Int[np.ndarray, " N"], item: Int[np.ndarray, " N"]
) -> Float[np.ndarray, "N 4"]:
    """Probability of each step, given the one before."""
    fit = np.einsum("ngk,ngk->ng", world.taste[user], world.style[item]) / np.sqrt(TASTES)  # [N, 2]
    own = world.mood[user] + world.quality[item]
    age = (frame["age"].fillna(33).to_numpy() - 33) / 12
    long = np.log(frame["duration"].fillna(33).to_numpy()) - 3.5
    category = frame["category"]
    young = category.isin(["games", "music", "comedy"]).to_numpy() * 2.0 - 1
    evening = np.cos((frame["hour"].to_numpy() - 20) * np.pi / 12)
    phone = frame["device"].eq("phone").to_numpy()
    woman = frame["gender"].eq("f").to_numpy() * 1.0
    pets = category.isin(["pets", "food"]).to_numpy() * 1.0
    logits = own + np.stack([
        -0.9 + 0.9 * fit[:, 0] - 0.5 * age * young + 0.3 * evening - 0.06 * frame["position"].to_numpy(),
        -0.4 + 0.7 * fit[:, 0] - np.where(phone, 0.8, 0.2) * long + 0.3 * age,
        -2.0 + 0.9 * fit[:, 1] + 0.6 * woman * pets - 0.3 * np.abs(age),
        -2.4 + 1.0 * fit[:, 1] - 0.4 * (frame["category"] == "news").to_numpy() + 0.3 * evening,
    ], axis=1)  # fmt: skip
    return 1 / (1 + np.exp(-logits))
