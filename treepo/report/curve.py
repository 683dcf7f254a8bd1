"""The learning curve of a run as a picture."""

from __future__ import annotations

from pathlib import Path

from treepo.run.folder import RunFolder, read_metrics


def draw_curve(folder: RunFolder) -> Path | None:
    """Write `curve.png` from `metrics.jsonl`; None while there is nothing to draw."""
    metrics = read_metrics(folder.metrics) if folder.metrics.exists() else []
    steps = [m for m in metrics if m.get("reward") is not None]
    evaluations = [m for m in metrics if "evaluation" in m]
    if not steps and not evaluations:
        return None

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    if steps:
        left.plot([m["step"] for m in steps], [m["reward"] for m in steps], color="0.65", lw=1, label="training reward")
    if evaluations:
        names = {"pass_at_k": "pass@{k}", "maj_at_k": "maj@{k}", "pass_at_1": "pass@1", "greedy": "greedy"}
        at = [m["step"] for m in evaluations]
        for (name, label), color in zip(names.items(), ("tab:green", "tab:orange", "tab:blue", "tab:red"), strict=True):
            found = [m["evaluation"][name] for m in evaluations]
            k = evaluations[0]["evaluation"]["samples"]
            left.plot(at, [f["mean"] for f in found], "o-", ms=3, color=color, label=f"held out: {label.format(k=k)}")
            left.fill_between(at, [f["low"] for f in found], [f["high"] for f in found], color=color, alpha=0.12, lw=0)
    left.set(xlabel="step", ylabel="reward, accuracy", ylim=(-0.02, 1.02))
    left.legend(fontsize=7, loc="lower right")
    if steps:
        at = [m["step"] for m in steps]
        right.plot(at, [m["tokens_flat"] for m in steps], color="0.65", label="flat: one row per leaf")
        right.plot(at, [m["tokens_generated"] for m in steps], color="tab:blue", label="generated: a shared token once")
        right.set(xlabel="step", ylabel="response tokens per step")
        right.set_ylim(bottom=0)
        right.legend(fontsize=7, loc="lower right")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
    path = folder.path / "curve.png"
    FigureCanvasAgg(figure).print_png(path)  # type: ignore[no-untyped-call]
    return path
