"""The learning curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from treepo.run.folder import RunFolder, read_metrics


def draw_curve(folder: RunFolder) -> Path | None:
    """Write `curve.png` from `metrics.jsonl` and return its path. None if there is nothing to draw yet."""
    metrics = read_metrics(folder.metrics) if folder.metrics.exists() else []
    steps = [m for m in metrics if m.get("reward/mean") is not None]
    evaluations = [m for m in metrics if "eval/samples" in m]
    if not steps and not evaluations:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    if steps:
        left.plot(
            [m["step"] for m in steps], [m["reward/mean"] for m in steps], color="0.65", lw=1, label="training reward"
        )
    if evaluations:
        k = evaluations[0]["eval/samples"]
        names = {f"sampled/pass@{k}": "tab:green", f"sampled/maj@{k}": "tab:orange", "sampled/pass@1": "tab:blue"}
        at = [m["step"] for m in evaluations]
        for name, color in (names | {"greedy/pass@1": "tab:red"}).items():
            mean, low, high = ([m[f"eval/{name}{end}"] for m in evaluations] for end in ("", "/low", "/high"))
            left.plot(at, mean, "o-", ms=3, color=color, label=f"held out: {name.replace('/', ' ')}")
            left.fill_between(at, low, high, color=color, alpha=0.12, lw=0)
    left.set(xlabel="step", ylabel="reward, accuracy", ylim=(-0.02, 1.02))
    left.legend(fontsize=7, loc="lower right")
    if steps:
        at = [m["step"] for m in steps]
        right.plot(at, [m["tokens/flat"] for m in steps], color="0.65", label="flat: one row per leaf")
        right.plot(at, [m["tokens/generated"] for m in steps], color="tab:blue", label="generated: a shared token once")
        right.set(xlabel="step", ylabel="response tokens per step")
        right.set_ylim(bottom=0)
        right.legend(fontsize=7, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    path = folder.path / "curve.png"
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
    return path
