"""The report of an agent: how good it is beside others, what it does, and what its experts and tasks do."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from apps import figures
from apps.errors import ConfigError, UserError
from apps.exported import exported_files
from apps.report import Page, Section
from apps.rl import pictures
from apps.rl.conflict import Conflict, between, episodes_of_every_task, probes, task_gradients
from apps.rl.evaluation import Evaluation, iqm
from apps.rl.history import Group, History, groups
from apps.rl.loading import Trained, load_trained
from apps.rl.prediction import expert_weights
from apps.rl.rollout import Rollout, Trace
from apps.rl.video import gif
from apps.runs import BEST, LAST, load_checkpoint, run_folder

MOST_CURVES, MOST_TASKS, RIVALS = 8, 8, 2
"""Groups of runs in one chart, tasks shown as pictures, other agents whose gradients are set beside."""
NOISY = 0.3
"""Cosine within a task below which a warning is given."""
STAGES = ("first quarter", "second quarter", "third quarter", "last quarter")


def write_report(trained: Trained, evaluation: Evaluation, path: Path) -> Path:
    """Write the page.

    Args:
        trained: the agent; curves come from the folder it was trained in, rivals from those beside it.
        evaluation: of it, with pictures of some episodes.
        path: of the file.
    """
    folder, tasks = run_folder(trained.path), trained.spec.tasks
    history = History(folder)
    found = groups(folder.parent, trained.spec.id)
    seen = episodes_of_every_task(trained, pictures=True)
    page = Page(
        title=f"{folder.name}: {trained.title}",
        subtitle=f"{trained.path}, environment {trained.spec.id}{f', {len(tasks)} tasks' if tasks else ''}",
        key_figures=_key_figures(trained, evaluation),
    )
    _returns(page, trained, evaluation)
    _video(page, seen.traces if tasks else evaluation.rollouts[evaluation.agent].traces, tasks)
    chance = float(np.mean(evaluation.rollouts["random actions"].returns))
    _learning(page, history, chance)
    _beside(page, found, chance)
    _exploration(page, trained, history)
    _experts(page, trained, history, seen)
    if len(tasks) > 1:
        _conflict(page, trained, seen, _rivals(trained, found))
    exported_files(page, folder)
    return page.write(path)


def _key_figures(trained: Trained, evaluation: Evaluation) -> dict[str, str]:
    own = evaluation.rollouts[evaluation.agent]
    chance = float(np.mean(evaluation.rollouts["random actions"].returns))
    found = {
        "mean return": f"{np.mean(own.returns):.4g}",
        "mean return of random actions": f"{chance:.4g}",
        "deviation over episodes": f"{np.std(own.returns):.3g}",
        "interquartile mean": f"{iqm(own.returns):.4g}",
    }
    if own.has_success:
        found["success"] = f"{np.mean(own.successes):.0%}"
    agent, collect = trained.agent, trained.config.collect
    learned = sum(p.numel() for p in agent.parameters() if p.requires_grad)
    steps = collect.random_steps + agent.updates * collect.update_every if agent.updates else 0
    return found | {"parameters": f"{learned:,}", "agent steps": f"{steps:,}"}


def _returns(page: Page, trained: Trained, evaluation: Evaluation) -> None:
    section = page.section("Returns")
    section.text(
        "Sums of rewards over whole episodes of the deterministic policy, from the same starts for every agent. The "
        "interquartile mean leaves out the best and the worst quarter of the episodes."
    )
    rows = evaluation.rows()
    for row in rows:
        part = row["agent"].strip()
        row["agent"] = f"{evaluation.agent}, {part}" if part in evaluation.tasks else part
    section.table([{name.replace("_", " "): row.get(name, "") for name in rows[0]} for row in rows])
    acting = sum(p.numel() for part in (trained.agent.encoder, trained.agent.actor) for p in part.parameters())
    section.text(f"Encoder and actor, which is what acts, have {acting:,} parameters; the others serve learning.")


def _video(page: Page, traces: Sequence[Trace], tasks: Sequence[str]) -> None:
    shown = _one_per_task(traces) if tasks else [trace for trace in traces if trace.frames]
    if not shown:
        return
    captions = [
        f"{tasks[one.task] if tasks else f'episode {i + 1}'}: {sum(one.rewards):.3g}" for i, one in enumerate(shown)
    ]
    words = "one per task" if tasks else "the first of the evaluation"
    page.section("What it does").animation(
        gif(pictures.film(shown, captions)),
        f"Episodes of the deterministic policy with their returns: {words}. An episode that is over stays pale.",
    )


def _one_per_task(traces: Sequence[Trace]) -> list[Trace]:
    """The first episode of each task that has pictures, by number of the task."""
    first: dict[int, Trace] = {}
    for trace in traces:
        if trace.frames:
            first.setdefault(trace.task, trace)
    return [first[task] for task in sorted(first)][:MOST_TASKS]


def _learning(page: Page, history: History, chance: float) -> None:
    training, tests = history.returns(), history.curve("val/return")
    if not len(training[0]) and not len(tests[0]):
        return
    section = page.section("Learning")
    section.figure(
        pictures.returns(training, tests, history.curve("val/return_std")[1], chance),
        "Returns over agent steps: training episodes explore, evaluations do not. The band is one deviation over the "
        "episodes of an evaluation.",
    )
    success = history.curve("val/success")
    if len(success[0]):
        section.figure(pictures.success(success), "Share of successful episodes in evaluations.")


def _beside(page: Page, found: list[Group], chance: float) -> None:
    """A curve per agent, if there are several runs in this environment."""
    if sum(len(group.curves) for group in found) < 2:
        return
    shown = sorted(found, key=lambda group: (-len(group.curves), -group.curves[0][0][-1]))[:MOST_CURVES]
    section = page.section("Beside other runs")
    section.figure(
        pictures.beside(shown, chance),
        "Runs in the same environment that lie in the same folder. Those of equal settings form one curve: their mean, "
        "and a band from the lowest to the highest of them; runs that stopped early are left out.",
    )
    rows = []
    for group in shown:
        steps, values = group.spread()
        last = values[:, -1]
        row = {"agent": group.title, "runs": len(last), "agent steps": int(steps[-1]), "mean at the end": last.mean()}
        rows.append(row | {"lowest": last.min(), "highest": last.max(), "best evaluation": values.mean(0).max()})
    section.table([{k: float(v) if isinstance(v, np.floating) else v for k, v in row.items()} for row in rows])


def _exploration(page: Page, trained: Trained, history: History) -> None:
    names = {"train/dormant": "dormant ratio of the actor", "train/std": "deviation of exploration"}
    curves = {title: history.curve(name) for name, title in names.items()}
    curves = {title: curve for title, curve in curves.items() if len(curve[0])}
    if not curves:
        return
    events = _events(trained)
    at = history.steps_at([one["update"] for one in events])
    kept = (at, np.array([one["kept"] for one in events])) if events else None
    section = page.section("Exploration and perturbation")
    section.text(f"{_perturbed(trained, len(events))} A unit is dormant if a batch of observations hardly moves it.")
    dotted = "; dotted lines are perturbations, the last panel has the share that weights kept" if events else ""
    section.figure(pictures.panels(curves, at, kept), f"Over agent steps{dotted}.")


def _perturbed(trained: Trained, times: int) -> str:
    one = trained.config.agent.perturb
    if one.kind == "none":
        return "The weights of this agent are not perturbed."
    if not times:
        return f"Weights were not perturbed yet: that is due every {one.interval:,} updates."
    source = "a sample of those that gave the best episodes" if one.kind == "task" else "fresh ones"
    return f"Weights were drawn {'once' if times == 1 else f'{times} times'} towards {source}."


def _events(trained: Trained) -> list[dict[str, float]]:
    """Perturbations of the whole training: the best checkpoint knows those before it alone."""
    last = run_folder(trained.path) / "checkpoints" / LAST
    return list(load_checkpoint(last, "rl")["events"]) if last.is_file() else trained.events


def _experts(page: Page, trained: Trained, history: History, seen: Rollout) -> None:
    weights = [expert_weights(trained.agent, trace.observations) for trace in seen.traces]
    if weights[0] is None:
        return
    section = page.section("Experts")
    used = np.concatenate(weights).mean(0)
    section.text(_idle(used, len(weights)))
    loads = history.loads()
    if loads:
        chart = figures.load_over_time(loads)
        for axes in chart.axes:
            axes.set_xlabel("agent step")
        section.figure(
            chart,
            "Share of the chosen experts in updates, over agent steps: one colour per expert, as below.",
        )
    _expert_tables(section, trained.spec.tasks, seen.traces, weights)
    names = trained.spec.tasks
    for trace in _one_per_task(seen.traces)[: 4 if names else 1]:
        own = weights[next(i for i, one in enumerate(seen.traces) if one is trace)]
        title = f"An episode of {names[trace.task]}" if names else "An episode"
        section.figure(
            pictures.along_episode(trace, own),
            f"{title}, return {sum(trace.rewards):.3g}: pictures underlined in the colour of the expert with the "
            "largest weight, and below the weights of all experts at every step.",
            photo=True,
        )


def _idle(used: np.ndarray, episodes: int) -> str:
    """Which experts do nothing, in words."""
    idle = np.flatnonzero(used < 0.1 / len(used)).tolist()
    where = f"in {episodes} episodes of the deterministic policy"
    if not idle:
        return f"Every one of {len(used)} experts has at least a tenth of an even share of the weight {where}."
    names = f"Expert {idle[0]} has" if len(idle) == 1 else f"Experts {', '.join(map(str, idle))} have"
    return f"{names} less than a tenth of an even share of the weight {where}."


def _expert_tables(
    section: Section, tasks: Sequence[str], traces: Sequence[Trace], weights: Sequence[np.ndarray]
) -> None:
    """Mean weights by task and by stage of an episode."""
    numbers = sorted({trace.task for trace in traces})
    if len(numbers) > 1:
        by_task = np.stack(
            [
                np.concatenate([w for one, w in zip(traces, weights, strict=True) if one.task == n]).mean(0)
                for n in numbers
            ]
        )
        apart = by_task.max(0) - by_task.min(0)
        section.figure(
            pictures.table(by_task, [tasks[n] for n in numbers]),
            f"Mean weight of the experts by task. Between tasks the weight of expert {int(apart.argmax())} differs "
            f"most, by {apart.max():.2f}; equal rows would mean that experts do not tell tasks apart.",
        )
    stages = [(np.arange(len(w)) * len(STAGES)) // len(w) for w in weights]
    place, every = np.concatenate(stages), np.concatenate(weights)
    present = [stage for stage in range(len(STAGES)) if (place == stage).any()]
    section.figure(
        pictures.table(np.stack([every[place == stage].mean(0) for stage in present]), [STAGES[s] for s in present]),
        "Mean weight of the experts by stage of an episode.",
    )


def _rivals(trained: Trained, found: Sequence[Group]) -> list[Trained]:
    """Trained agents of other kinds, the first run of each that can be loaded."""
    rivals: dict[str, Trained] = {}
    for group in found:
        for file in (folder / "checkpoints" / BEST for folder in group.folders):
            name = group.title.split(" (")[0]
            if file.is_file() and name != trained.title and name not in rivals and len(rivals) < RIVALS:
                with contextlib.suppress(UserError, ConfigError):  # of another version
                    rivals[name] = load_trained(file)
    return list(rivals.values())


def _conflict(page: Page, trained: Trained, seen: Rollout, rivals: Sequence[Trained]) -> None:
    batches = probes(seen.traces, trained.spec.tasks)
    section = page.section("Do tasks agree?")
    if len(batches) < 2:
        section.text("Too few steps of two tasks were seen to compare their gradients.")
        return
    own = task_gradients(trained.agent, batches)
    layer = "experts and gate" if trained.config.agent.actor == "moe" else "middle layer"
    section.text(verdict(own))
    section.figure(
        pictures.cosines({"all of the actor": own.actor, f"its {layer} alone": own.middle}, own.tasks),
        "Cosine of the gradients that every two tasks ask of the actor, mean over pairs of batches. The diagonal "
        "compares batches of one task: cosines between tasks mean little where a task hardly agrees with itself.",
    )
    if not rivals:
        return
    rows = [{"agent": trained.title} | own.scalars()]
    for rival in rivals:
        theirs = probes(episodes_of_every_task(rival).traces, rival.spec.tasks)
        if len(theirs) > 1:
            name = f"{rival.title} ({run_folder(rival.path).name})"
            rows.append({"agent": name} | task_gradients(rival.agent, theirs).scalars())
    section.text("The same figures beside those of other agents that were trained here, each on its own episodes.")
    section.table([{name.replace("_", " "): value for name, value in row.items()} for row in rows])


def verdict(one: Conflict) -> str:
    """What the cosines mean, in words."""
    values, within = between(one.actor), float(np.diag(one.actor).mean())
    i, j = (side[values.argmin()] for side in np.triu_indices(len(one.tasks), 1))
    opposed = int((values < 0).sum())
    pair = f"{one.tasks[i]} and {one.tasks[j]} ({values.min():.2f})"
    what = (
        f"{opposed} of {len(values)} pairs of tasks conflict, most of all {pair}: a step of the actor for one makes "
        "the other worse."
        if opposed
        else f"No pair of tasks conflicts; least alike are {pair}."
    )
    noisy = " Batches of one task hardly agree either, so that these figures say little." if within < NOISY else ""
    inside = f"{between(one.middle).mean():.2f} and {np.diag(one.middle).mean():.2f}"
    return (
        f"{what} Between tasks the mean cosine is {values.mean():.2f}, within a task, on other observations, "
        f"{within:.2f}; in the middle layer {inside}.{noisy}"
    )
