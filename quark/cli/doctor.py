"""``quark doctor``: what is installed, what is missing, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from quark.cli.exit_codes import ExitCode

_REQUIRED = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "accelerate",
    "numpy",
    "polars",
    "pydantic",
    "typer",
    "rich",
    "httpx2",
    "jinja2",
    "matplotlib",
    "nltk-vader-sentiment",
)
_OPTIONAL = {
    "gguf": "models in GGUF files",
    "peft": "low-rank adapters",
    "tensorboard": "metrics in TensorBoard",
    "wandb": "metrics in Weights & Biases",
    "trackio": "metrics in trackio",
}
_LOW_DISK_BYTES = 2_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the examination."""

    group: str
    name: str
    state: Literal["ok", "missing", "slower", "untried", "broken"]
    """``missing`` is optional and harmless; ``broken`` stops quark, or a run with the model, from working.
    ``slower`` and ``untried`` are of a model's checks."""
    detail: str
    way_out: str = ""


def doctor(
    model: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Also try what a run does with this model. As model.name."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on stdout.")
    ] = False,
) -> None:
    """Examine the installation: versions, devices, disk, optional parts. With --model, try a model.

    Exits with status 3 if something that quark needs is broken, or a run with the model is not possible.
    """
    import dataclasses

    from quark.cli.console import foreign, grid, make_console, print_json, prose

    findings = [*_quark(), *_packages(), *_devices(), *_disk(), *_optional()]
    if model is not None:
        findings += _model(model)
    is_healthy = all(finding.state != "broken" for finding in findings)
    if as_json:
        print_json(
            {
                "healthy": is_healthy,
                "findings": [dataclasses.asdict(finding) for finding in findings],
            }
        )
    else:
        styles = {"ok": "green", "broken": "bold red"}
        table = grid("", "part", "", "found", wide=(3,))
        group = ""
        for finding in findings:
            if group and finding.group != group:
                table.add_section()
            table.add_row(
                prose(finding.group if finding.group != group else "", "bold"),
                prose(finding.name),
                prose(finding.state, styles.get(finding.state, "yellow")),
                foreign(" → ".join(filter(None, (finding.detail, finding.way_out))), limit=300),
            )
            group = finding.group
        table.columns[3].overflow = "fold"
        table.columns[3].no_wrap = False
        console = make_console()
        console.print(table)
        verdict = "all that is needed is here" if is_healthy else "something needed is broken"
        console.print(prose(verdict, "green" if is_healthy else "bold red"))
    if not is_healthy:
        raise typer.Exit(ExitCode.INPUT)


def _model(name: str) -> list[Finding]:
    """What a run would find out about a model before it begins.

    Raises:
        ModelError: it cannot be found.
    """
    from quark.models.check.trials import check_policy
    from quark.models.config import ModelConfig
    from quark.models.loading import load_policy, load_tokenizer

    config = ModelConfig(name=name)
    load_tokenizer(config)
    check = check_policy(load_policy(config, num_quantiles=2, seed=0))
    states: dict[str, Literal["ok", "slower", "untried", "broken"]] = {
        "passed": "ok",
        "slower": "slower",
        "untried": "untried",
        "refused": "broken",
    }
    return [
        Finding(
            group="model", name=finding.name, state=states[finding.state], detail=finding.detail
        )
        for finding in check.findings
    ]


def _quark() -> list[Finding]:
    import importlib
    import platform

    from quark import __version__

    findings = [
        Finding(group="quark", name="quark", state="ok", detail=__version__),
        Finding(
            group="quark",
            name="python",
            state="ok",
            detail=f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        ),
    ]
    try:
        extension = importlib.import_module("quark._pool_rs")
    except ImportError as error:
        findings.append(
            Finding(
                group="quark",
                name="pool extension",
                state="broken",
                detail=str(error),
                way_out="build it: maturin develop --release",
            )
        )
    else:
        where = Path(extension.__file__ or "").name
        findings.append(Finding(group="quark", name="pool extension", state="ok", detail=where))
    return [*findings, *_assets()]


def _assets() -> list[Finding]:
    from quark.assets import AssetKind, asset_path

    wanted: tuple[tuple[AssetKind, str], ...] = (
        ("models", "reviews"),
        ("rewards", "sentiment"),
        ("rewards", "toxicity"),
        ("prompts", "reviews"),
    )
    findings = []
    for kind, name in wanted:
        try:
            path = asset_path(kind, name)
            is_there = path.is_file() or any(path.glob("*.safetensors"))
        except FileNotFoundError:
            is_there = False
        findings.append(
            Finding(
                group="quark",
                name=f"{kind.removesuffix('s')} {name}",
                state="ok" if is_there else "broken",
                detail="embedded" if is_there else "not in the installation",
                way_out="" if is_there else "install quark again: pip install . in its checkout",
            )
        )
    return findings


def _packages() -> list[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from quark.installing import install_command

    findings = []
    for name in _REQUIRED:
        try:
            findings.append(Finding(group="packages", name=name, state="ok", detail=version(name)))
        except PackageNotFoundError:
            findings.append(
                Finding(
                    group="packages",
                    name=name,
                    state="broken",
                    detail="not installed",
                    way_out=install_command(name),
                )
            )
    return findings


def _optional() -> list[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from quark.installing import install_command

    findings = []
    for name, purpose in _OPTIONAL.items():
        try:
            findings.append(Finding(group="optional", name=name, state="ok", detail=version(name)))
        except PackageNotFoundError:
            findings.append(
                Finding(
                    group="optional",
                    name=name,
                    state="missing",
                    detail=f"for {purpose}",
                    way_out=install_command(name),
                )
            )
    return findings


def _devices() -> list[Finding]:
    import os

    try:
        import torch
    except ImportError as error:
        return [Finding(group="devices", name="torch", state="broken", detail=str(error))]
    cpus = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used"
    findings = [Finding(group="devices", name="cpu", state="ok", detail=cpus)]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        detail = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        findings.append(Finding(group="devices", name=f"cuda:{index}", state="ok", detail=detail))
    if not torch.cuda.is_available():
        findings.append(
            Finding(
                group="devices",
                name="cuda",
                state="missing",
                detail="no GPU: training uses the CPU",
            )
        )
    return findings


def _disk() -> list[Finding]:
    import shutil

    from quark.cli.console import size

    usage = shutil.disk_usage(Path.cwd())
    is_low = usage.free < _LOW_DISK_BYTES
    return [
        Finding(
            group="disk",
            name="free here",
            state="missing" if is_low else "ok",
            detail=f"{size(usage.free)} of {size(usage.total)}",
            way_out="runs with larger models need more" if is_low else "",
        )
    ]
