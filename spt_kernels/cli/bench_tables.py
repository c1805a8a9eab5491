"""What `spt-kernels bench table7` shows: the cost table in parts that fit 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .terminal import percent, size, table

if TYPE_CHECKING:
    from ..costs import SensitivitySpeed, Table7


def cost_parts(result: Table7) -> list[Any]:
    """Everything to be shown, one after the other."""
    parts = [_training_table(result), ""]
    if any(row.operators for row in result.rows):  # not where steps were not run
        parts += [_demand_table(result), ""]
    if any(row.inference_peak_bytes for row in result.rows):
        parts += [_inference_table(result), ""]
    if result.sensitivity:
        parts += [_speed_table(result.sensitivity), ""]
    return [*parts, *notes(result)]


def _training_table(result: Table7) -> Any:
    from ..costs.drawing import unit_of

    setting, papers = result.setting, result.papers
    how = "measured" if setting.on_gpu else "accounted"
    title = f"Training {setting.model_title()}, {setting.dtype}, {setting.step}: peak {how}"
    title += f" at batch {setting.batch_size}"
    if setting.rounds:
        title += f", time on {setting.device} at batch {setting.step_batch_size}"
    unit = unit_of([row.tuning_peak_bytes for row in result.rows])
    rows = [
        (
            row.method,
            percent(row.trained_share, 2),
            _in_unit(row.tuning_peak_bytes, unit),
            _ratio(result.over(row, "full", "tuning_peak_bytes")),
            _ratio(result.over(row, "lora-16", "tuning_peak_bytes")),
            str(papers[row.method].tuning_gb) if row.method in papers else "",
            "–" if row.step is None else _step_time(row.step.median_ms, setting.on_gpu),
            _ratio(result.step_over(row, "full")),
            _ratio(result.step_over(row, "lora-16")),
        )
        for row in result.rows
    ]
    peak, step = (
        (unit, "/ full", "/ LoRA", "paper"),
        ("step, ms" if setting.on_gpu else "step, s",),
    )
    titles = ("method", "trained", *peak, *step, "/ full", "/ LoRA")
    return table(titles, rows, title, is_wide=True)


def _demand_table(result: Table7) -> Any:
    """What is the host's, and on a card what is the card's."""
    on_gpu = result.setting.on_gpu
    columns = {"operators": "operators"}
    if on_gpu:
        columns |= {"kernels": "kernels", "kernel_ms": "kernels, ms"}
    rows = [
        (
            row.method,
            *(
                cell
                for column in columns
                for cell in (
                    _number(getattr(row, column)),
                    _ratio(result.over(row, "full", column)),
                    _ratio(result.over(row, "lora-16", column)),
                )
            ),
        )
        for row in result.rows
    ]
    titles = [title for name in columns.values() for title in (name, "/ full", "/ LoRA")]
    asked = "its host and of the card" if on_gpu else "its host"
    return table(("method", *titles), rows, f"What a step asks of {asked}", is_wide=True)


def _step_time(ms: float, on_gpu: bool) -> str:
    return f"{ms:.1f}" if on_gpu else f"{ms / 1e3:.2f}"


def _number(number: float) -> str:
    if not number:
        return "–"
    return f"{number:,}" if isinstance(number, int) else f"{number:,.1f}"


def _inference_table(result: Table7) -> Any:
    from ..costs import PAPER_SAMPLES
    from ..costs.drawing import unit_of

    papers, speed = result.papers, result.sensitivity
    unit = unit_of([row.inference_peak_bytes for row in result.rows])
    rows = [
        (
            row.method,
            "–" if row.inference is None else f"{row.inference.median_ms:.1f}",
            _ratio(row.inference_over_plain),
            str(papers[row.method].inference_ms) if row.method in papers else "",
            _in_unit(row.inference_peak_bytes, unit),
            str(papers[row.method].inference_gb) if row.method in papers else "",
            f"{speed.seconds(PAPER_SAMPLES):,.1f}" if speed and row.is_ours else "",
            size(row.file_bytes) if row.file_bytes else "–",
        )
        for row in result.rows
    ]
    names = ("method", "ms/image", "/ plain", "paper", unit, "paper", "scores, s", "file")
    return table(names, rows, "Inference, merged where it can be; scores; the file", is_wide=True)


def _in_unit(number: int, unit: str) -> str:
    from ..costs.drawing import UNITS

    return f"{number / UNITS[unit]:,.2f}" if number else "–"


def _ratio(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def notes(result: Table7) -> list[str]:
    """How far the figures may be trusted, and why some are missing."""
    spreads = [s for row in result.rows for s in (row.step, row.inference) if s is not None]
    lines = []
    if spreads:
        rounds, noise = result.setting.rounds, percent(max(spread.noise for spread in spreads))
        several = f"times are medians of {rounds}, their spread at most ± {noise}"
        if rounds > 1 and not result.setting.on_gpu:
            several += "; over full and plain: of the rounds' ratios"
        lines.append(several if rounds > 1 else "times are of one run: their spread is not known")
    if any(row.method == "lora-16" for row in result.rows):
        lines.insert(0, "/ LoRA: over lora-16, which is on qkv")
    both = [row for row in result.rows if result.setting.on_gpu and row.tuning_peak_bytes]
    if both:
        ratios = [row.accounted_peak_bytes / row.tuning_peak_bytes for row in both]
        lines.append(f"accounted over measured peaks: {min(ratios):.2f} to {max(ratios):.2f}")
    lines += [f"{row.method}: {row.note}" for row in result.rows if row.note]
    return lines + [f"{name}: left out, {reason}" for name, reason in result.missing.items()]


def _speed_table(speed: SensitivitySpeed) -> Any:
    from ..costs import PAPER_SAMPLES, PAPER_SENSITIVITY_S
    from ..costs.sensitivity_speed import BATCH_SQUARED

    rows = [
        (
            f"{way} *" if way == BATCH_SQUARED else way,
            f"{speed.per_second(way):,.2f}",
            f"{speed.seconds(PAPER_SAMPLES, way):,.1f}",
            f"{speed.ours_over(way):.2f}",
        )
        for way in speed.per_sample
    ]
    rows += [(way, reason, "–", "–") for way, reason in speed.missing.items()]
    per_s = PAPER_SAMPLES / PAPER_SENSITIVITY_S
    rows.append(("the paper, on a GPU *", f"{per_s:,.2f}", f"{PAPER_SENSITIVITY_S:,.1f}", ""))
    columns = ("* another quantity", "samples / s", f"{PAPER_SAMPLES} in s", "ours / this")
    title = f"Sensitivity of every candidate parameter, fp32, in batches of {speed.batch_size}"
    return table(columns, rows, title)
