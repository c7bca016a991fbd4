"""The page of `from_clip.py` and its pictures, made of `figures.json`."""

import json
import textwrap
from pathlib import Path
from statistics import mean
from typing import Any

from compare import MAIN_FIGURE, TRAINED, VENDORS, mean_and_deviation
from emoji_data import HELD_OUT
from matplotlib.figure import Figure

from diffclip_hf.common.whole_files import write_text_whole, write_whole


# In the page's order: what stands in the tables, and the colour in the picture of the first steps.
NAMES = {
    "clip": "CLIP, before",
    "plain": "a. trained on",
    "lora": "b. LoRA",
    "second": "c. second query, rank 8",
    "second-full": "c. second query, full",
    "lora-alone": "b. LoRA alone",
    "second-alone": "c. second query alone",
    "scratch": "d. paper's, from scratch",
    "naive": "e. paper's, naively",
    "naive-taught": "e. paper's, taught",
}
COLOURS = {"plain": "#777777", "lora": "#0072b2", "second": "#c0392b", "naive": "#e69f00", "naive-taught": "#009e73"}
DASHES = {"plain": "-", "lora": (0, (6, 4)), "second": (0, (2, 3)), "naive": "-", "naive-taught": "-"}
# What is compared pair by pair: an arm, and that from which its figure is taken away.
PAIRS = (
    ("second", "plain"),
    ("second", "lora"),
    ("second-full", "plain"),
    ("second-alone", "lora-alone"),
    ("naive", "plain"),
    ("naive-taught", "plain"),
    ("scratch", "plain"),
)
# An arm is above another where the means are further apart than so many times the larger deviation.
CLEARLY = 2
FIRST_STEPS = 14
Groups = dict[str, list[dict[str, Any]]]


def by_arm(content: dict[str, Any]) -> Groups:
    """Return the runs of each arm, in the order of `NAMES` and of the seeds."""
    runs = sorted(content["runs"].values(), key=lambda run: run["seed"])
    return {name: found for name in NAMES if (found := [run for run in runs if run["arm"] == name])}


def shown(values: list[float], form: str = ".1f") -> str:
    """Return a mean with its deviation, where there are several values."""
    average, deviation = mean_and_deviation(values)
    number = format(average, form)
    # Nothing has no sign.
    number = number.lstrip("+-") if float(number) == 0 else number.replace("-", "−")
    return f"{number} ± {format(deviation, form.lstrip('+'))}" if len(values) > 1 else number


def points(runs: list[dict], vendor: str, name: str = MAIN_FIGURE) -> list[float]:
    """Return a figure of each run in percent."""
    return [100 * run["figures"][vendor][name] for run in runs]


def figures_table(groups: Groups, vendor: str) -> str:
    """Return a style's figures as Markdown."""
    names = [name for name in groups["clip"][0]["figures"][vendor] if name != "loss" and "@1 " not in name]
    short = [name.split(" among 1")[0] if "Recall" in name else name for name in names]
    lines = ["| | seeds | " + " | ".join(short) + " | loss, nats |", "|---|---|" + "---|" * (len(names) + 1)]
    for arm, runs in groups.items():
        cells = [shown(points(runs, vendor, name)) for name in names]
        cells.append(shown([run["figures"][vendor]["loss"] for run in runs], ".2f"))
        lines.append(f"| {NAMES[arm]} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(groups: Groups, arm: str, other: str, vendor: str) -> list[float]:
    """Return by how many points an arm is above another, for each seed that both have."""
    theirs = {run["seed"]: run for run in groups[other]}
    runs = [run for run in groups[arm] if run["seed"] in theirs]
    return [
        one - two
        for one, two in zip(points(runs, vendor), points([theirs[run["seed"]] for run in runs], vendor), strict=True)
    ]


def pairs_table(groups: Groups) -> str:
    """Return the differences of pairs of arms as Markdown."""
    lines = [f"| | {' | '.join(VENDORS[vendor] for vendor in (HELD_OUT, TRAINED))} |", "|---|---|---|"]
    for arm, other in PAIRS:
        if arm in groups and other in groups and paired(groups, arm, other, HELD_OUT):
            cells = [shown(paired(groups, arm, other, vendor), "+.1f") for vendor in (HELD_OUT, TRAINED)]
            lines.append(f"| {NAMES[arm]} − {NAMES[other]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def is_clearly_above(groups: Groups, arm: str, other: str) -> bool:
    """Return whether an arm is above another by the page's rule, on both styles."""
    for vendor in VENDORS:
        (own, deviation), (theirs, other_deviation) = (
            mean_and_deviation(points(groups[name], vendor)) for name in (arm, other)
        )
        if own - theirs <= CLEARLY * max(deviation, other_deviation):
            return False
    return True


def verdict(groups: Groups) -> str:
    """Return what the rule says of the second query, in a paragraph."""
    others = ("plain", "lora")
    earned = [
        arm
        for arm in ("second", "second-full")
        if arm in groups and all(is_clearly_above(groups, arm, other) for other in others)
    ]
    rule = (
        f"The rule was set before: differential attention from a pretrained CLIP enters the package if arm c is "
        f"above both a and b on both styles, by more than {CLEARLY} times the larger of the two deviations, in "
        f"{MAIN_FIGURE}."
    )
    if min(len(groups[name]) for name in (*others, "second")) < 2:
        return f"{rule} With one seed there's no deviation, so nothing can be said yet."
    if earned:
        return f"{rule} **It is**, with {' and '.join(NAMES[arm].split('. ')[1] for arm in earned)}."
    return f"{rule} **It isn't**, so the experiment stays here and the package has nothing of it."


def span(values: list[float]) -> str:
    """Return the least and the largest number, to two places."""
    least, largest = (f"{end(values):.2f}" for end in (min, max))
    return least if least == largest else f"{least} to {largest}"


def lambda_table(groups: Groups) -> str:
    """Return where λ began and ended, and how far the second maps are from the first, as Markdown."""
    lines = [
        "| | tower | λ before | λ after | mean λ after | how far A2 is from A1, by layer |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in groups.items():
        for tower, title in (("vision", "image"), ("text", "text")):
            if tower not in runs[0]["distance"]:
                continue
            before, after = (
                [one for run in runs for layer in run["lambda"][end][tower] for one in layer] for end in (0, 1)
            )
            layers = zip(*(run["distance"][tower] for run in runs), strict=True)
            far = ", ".join(f"{mean(layer):.2f}" for layer in layers)
            lines.append(f"| {NAMES[arm]} | {title} | {span(before)} | {span(after)} | {mean(after):.2f} | {far} |")
    return "\n".join(lines)


def loss_at(runs: list[dict], step: int) -> list[float]:
    """Return each run's loss on the fixed batch after so many steps."""
    return [dict(run["fixed batch"])[step] for run in runs]


def steps_table(groups: Groups, steps: list[int]) -> str:
    """Return the losses of the first steps, and the last, as Markdown."""
    lines = ["| | " + " | ".join(f"step {step}" for step in steps) + " |", "|---|" + "---|" * len(steps)]
    for arm, runs in groups.items():
        if arm not in ("clip", "scratch"):
            cells = [f"{mean(loss_at(runs, step)):.4f}" for step in steps]
            lines.append(f"| {NAMES[arm]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Pictures, as wide as a telephone shows without making them smaller -------------------------------------------------


def draw_first_steps(groups: Groups, path: Path) -> None:
    """Draw the loss on the fixed batch after each of the first steps, the mean over the seeds."""
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axis = figure.subplots()
    for arm in COLOURS:
        if arm in groups:
            steps = [step for step, _ in groups[arm][0]["fixed batch"] if step <= FIRST_STEPS]
            losses = [mean(loss_at(groups[arm], step)) for step in steps]
            axis.plot(steps, losses, color=COLOURS[arm], ls=DASHES[arm], lw=2.2, label=NAMES[arm])
    axis.set_xlabel("step", fontsize=12)
    axis.set_ylabel("loss, nats", fontsize=12)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=11)
    figure.savefig(path, format="png", dpi=150)


def draw_figures(groups: Groups, path: Path) -> None:
    """Draw each seed's main figure as a dot and the mean as a line, an arm a row."""
    figure = Figure(figsize=(5.2, 0.42 * len(groups) + 1.3), layout="constrained")
    axis = figure.subplots()
    for vendor, colour, label in ((HELD_OUT, "#c0392b", "unseen style"), (TRAINED, "#0072b2", "trained style")):
        for row, runs in enumerate(groups.values()):
            values = points(runs, vendor)
            axis.plot(values, [row] * len(values), "o", color=colour, ms=6, alpha=0.6, label=None if row else label)
            axis.plot([mean(values)] * 2, [row - 0.32, row + 0.32], color=colour, lw=2)
    axis.set_yticks(range(len(groups)), [NAMES[arm] for arm in groups], fontsize=11)
    axis.invert_yaxis()
    axis.set_xlabel(f"{MAIN_FIGURE}, %", fontsize=12)
    axis.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=11)
    figure.savefig(path, format="png", dpi=150)


# The page ------------------------------------------------------------------------------------------------------------

PAGE = """# Differential attention for a CLIP that one has

DiffCLIP is trained from scratch. Can a pretrained CLIP become one instead, and is it better for it? This is an
experiment on the embedded model's drawings (`embedded/README.md`), with {parameters} parameters: a small plain CLIP is
trained on in several ways.

{verdict}

Everything on this page is made by

```bash
python embedded/from_clip.py --cache-dir .cache/embedded --output-dir docs/from_clip
```

on {machine}. {state}

## The form

The paper's form can't begin as a CLIP. There two heads share one difference of maps, and a norm takes away how large
each token's output was. So here each head h keeps its own query, keys and values, and gets a second query
Q2 = x·(W_q + B·A), where B begins as 0:

    out_h = (A1 − λ_h·A2)·v / (1 − λ_h)

At the start A2 = A1, so the output is A1·v for every λ_h in [0, 1), which is exactly what the CLIP computed, and B has
a gradient from the first step. The rows of the maps sum to 1, and there's no norm. λ_h is learned, one for each head,
from 0.2 for a layer's first head to 0.5 for its last.

## The arms

A plain CLIP is trained for {clip_epochs} epochs ({clip_steps} steps of 256 pairs) with each seed. All arms but d then
take {epochs} more epochs ({steps} steps) with the same batches:

- **a.** The CLIP is trained on.
- **b.** LoRA of rank 4 on queries and values is added to it, {lora} parameters, and the rest is trained, too.
- **c.** It gets second queries of rank 8, {second} parameters, λ among them; or a full matrix in place of B·A,
  {full} parameters. The rest is trained, too.
- **b and c, alone.** The CLIP is frozen, and only the added parameters are trained.
- **d.** The paper's form is trained from scratch for all the {all_steps} steps.
- **e.** The paper's form gets the CLIP's weights as they are; "taught" adds distillation from the CLIP (`--teacher`,
  both weights 1).

The arms' learning rate is {learning_rate:g} after a warmup of {warmup_steps} steps, with a cosine to 0, and {rate:g}
times as high for what b and c add, except for the full matrix. The CLIP has {first_learning_rate:g} and
{first_warmup_steps} steps of warmup, and so has d, over its whole budget. Nothing was tuned for any arm.

## {unseen}

In percent, the mean ± the standard deviation over the seeds. Zero-shot is the own name among others drawn at random,
and recall is among all 1,906.

{unseen_table}

## {trained}

{trained_table}

![{figures_text}](figures.png)

## Seed by seed

Arms of one seed begin with the same CLIP and see the same batches, so their differences say more than the two means.
In points of {main_figure}:

{pairs_table}

## The first steps

The loss on one fixed batch of 256 pairs, in nats, the mean over the seeds, measured in float32:

{steps_table}

![{steps_text}](first_steps.png)

{jump}

## λ, and how far A2 leaves A1

The distance is half the sum of |A1 − A2| over the keys: 0 for equal maps, 1 for maps that share no key. It's the mean
over heads, queries and seeds. In d and e it's that of the two heads of a pair, which begin apart.

{lambda_table}

## What this can and can't show

{shows}
"""

SHOWS = """It can show that the form begins exactly where the CLIP was, that it trains, and how it compares with the
same number of parameters elsewhere, given the same short time. A difference that isn't clearly larger than its
deviation says nothing.

It can't show what happens at the size that matters: less than a million parameters against 150 million,
drawings in 6 × 6 patches on which an attention map has little noise to remove, and CLIPs that haven't stopped
improving when the arms begin, so that plain training gains by itself. The arms' steps are few, and learning
rates weren't tuned: another rate for the second queries, a longer run, or a λ for each token may do what this didn't.
The CLIP's learning rate falls to 0 and then rises again, and d's falls once, so d against a compares more than forms.

To save time, models have less than half of the embedded model's width and depth, and the arms are short.
`--size embedded` and `--epochs` take larger ones, into another folder."""


def figures_text(groups: Groups) -> str:
    """Return the picture of the figures in words."""
    rows = [
        f"{NAMES[arm]} {mean(points(runs, HELD_OUT)):.1f} and {mean(points(runs, TRAINED)):.1f}"
        for arm, runs in groups.items()
    ]
    return (
        f"Every seed's {MAIN_FIGURE} as dots; means in percent on the unseen and the trained style: {'; '.join(rows)}"
    )


def jump(groups: Groups) -> str:
    """Return how the arms' first losses compare, in a sentence or two."""
    clips = {run["seed"]: loss_at([run], run["steps"])[0] for run in groups["clip"]}

    def furthest(arm: str) -> float:
        return max(abs(loss_at([run], 0)[0] - clips[run["seed"]]) for run in groups[arm])

    found = [arm for arm in ("second", "second-full", "second-alone") if arm in groups]
    away = max(furthest(arm) for arm in found)
    naive = mean(loss_at(groups["naive"], 0)) if "naive" in groups else None
    same = (
        "no seed's first loss differs from the CLIP's in the sixth decimal"
        if away < 1e-6
        else (f"the first losses differ from the CLIP's by {away:.1g} at most")
    )
    rest = f" The paper's form begins at {naive:.2f}, where guessing has ln 256 = 5.55." if naive is not None else ""
    return f"With second queries nothing jumps: {same}.{rest}"


def state_of(groups: Groups) -> str:
    """Return how many seeds there are, and how to finish where some arm lacks one."""
    counts = {arm: len(runs) for arm, runs in groups.items()}
    most = max(counts.values())
    seeds = f"There {'is one seed' if most == 1 else f'are {most} seeds'}."
    lacking = [NAMES[arm] for arm in NAMES if counts.get(arm, 0) < most]
    if lacking:
        seeds += f" Some arms have fewer as yet: {', '.join(lacking)}."
    if most < 3 or lacking:
        seeds += " The command goes on from what `figures.json` has, and trains the runs that lack."
    return seeds


def machine_of(run: dict[str, Any]) -> str:
    """Return what a run was trained on, in words."""
    machine, torch = run["machine"], run["versions"]["torch"]
    return f"{machine['threads']} of {machine['cores']} cores of an {machine['processor']}, torch {torch}"


def page(content: dict[str, Any]) -> str:
    """Return the page of the runs in `figures.json`.

    Raises:
        ValueError: There's no run of a CLIP or of an arm that the verdict needs.
    """
    groups, settings = by_arm(content), content["settings"]
    if lacking := [arm for arm in ("clip", "plain", "lora", "second") if arm not in groups]:
        raise ValueError(f"There are no runs of {', '.join(lacking)}, without which there's nothing to compare.")
    first = groups["clip"][0]
    last = groups["plain"][0]["steps"]
    added = {arm: f"{runs[0]['added parameters']:,}" for arm, runs in groups.items()}
    starts = [f"{NAMES[arm]} {mean(loss_at(groups[arm], 0)):.2f}" for arm in COLOURS if arm in groups]
    return PAGE.format(
        **settings,
        parameters=f"{first['parameters']:,}",
        verdict=textwrap.fill(verdict(groups), 119),
        machine=machine_of(first),
        state=state_of(groups),
        clip_steps=first["steps"],
        steps=last,
        all_steps=first["steps"] + last,
        lora=added["lora"],
        second=added["second"],
        full=added.get("second-full", "no"),
        unseen=f"On {VENDORS[HELD_OUT]} ({HELD_OUT})",
        trained=f"On {VENDORS[TRAINED]} ({TRAINED})",
        unseen_table=figures_table(groups, HELD_OUT),
        trained_table=figures_table(groups, TRAINED),
        figures_text=figures_text(groups),
        main_figure=MAIN_FIGURE,
        pairs_table=pairs_table(groups),
        steps_table=steps_table(groups, sorted({0, 1, 7, FIRST_STEPS, last})),
        steps_text=f"The loss over the first {FIRST_STEPS} steps; it begins at {', '.join(starts)}",
        jump=jump(groups),
        lambda_table=lambda_table(groups),
        shows=SHOWS,
    )


def write_report(folder: Path) -> None:
    """Write the page and the pictures of the `figures.json` in a folder."""
    content = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    text, groups = page(content), by_arm(content)
    write_whole(folder / "figures.png", lambda path: draw_figures(groups, path))
    write_whole(folder / "first_steps.png", lambda path: draw_first_steps(groups, path))
    write_text_whole(folder / "README.md", text)
