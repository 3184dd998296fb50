"""What each role's engines need before any worker starts: checked, given GPUs, and told to people."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence

from trtserve.plugins.api import EnginePlan, Role
from trtserve.plugins.manager import PluginError, PluginManager
from trtserve.server.workers.engine_config import VISIBLE_GPUS, engine_config
from trtserve.settings.errors import SettingsError
from trtserve.settings.schema import Settings


def plan_engines(settings: Settings, roles: Iterable[Role], manager: PluginManager) -> dict[Role, EnginePlan]:
    """Empty for an engine that has no plans. Raises PluginError naming every problem of every role."""
    plans: dict[Role, EnginePlan] = {}
    problems: list[str] = []
    for role in roles:
        try:
            plan = manager.plan_engine(settings.engine, engine_config(settings, role, settings.model, manager))
        except PluginError as error:
            problems.append(str(error))
            continue
        if plan is not None:
            plans[role] = plan
    if problems:
        raise PluginError("\n".join(problems))
    if len(plans) > 1:
        manager.check_plans(settings.engine, plans)
    return plans


def gpus_of_workers(
    settings: Settings, workers: Sequence[Role], plans: Mapping[Role, EnginePlan]
) -> list[tuple[str, ...]]:
    """For each worker the GPUs that it sees; () for a worker that is alone and sees what the server does.

    Those of `--gpus`, or else the server's own, in order. Raises SettingsError where they do not suffice, and for a
    worker that only a person can start.
    """
    for role in workers:
        if plans[role].by_hand:
            raise SettingsError(f"--{_count_setting(role)}: {plans[role].by_hand}")
    counts = [plans[role].num_gpus for role in workers]
    if settings.gpus is None and len(workers) < 2:
        return [()] * len(workers)
    source, gpus = _gpus(settings, sum(counts))
    if len(gpus) < sum(counts) or len(set(gpus)) < len(gpus):
        needed = " + ".join(map(str, counts))
        raise SettingsError(
            f"{source}: the {len(workers)} workers need {needed} GPUs, {sum(counts)} in all; name as many, each once"
        )
    taken = iter(gpus)
    return [tuple(next(taken) for _ in range(count)) for count in counts]


def _gpus(settings: Settings, needed: int) -> tuple[str, list[str]]:
    if settings.gpus is not None:
        return f"--gpus {settings.gpus}", [str(int(gpu)) for gpu in settings.gpus.split(",")]
    visible = os.environ.get(VISIBLE_GPUS)
    if visible is not None:
        return f"{VISIBLE_GPUS}={visible}", [gpu for gpu in visible.split(",") if gpu]
    return "--gpus", [str(gpu) for gpu in range(needed)]


def _count_setting(role: Role) -> str:
    return {Role.AGG: "workers", Role.PREFILL: "prefill-workers", Role.DECODE: "decode-workers"}[role]


def describe_engine(engine: str, role: Role, plan: EnginePlan) -> list[str]:
    """Lines for --dry-run."""
    gpus = f"{plan.num_gpus} GPU{'s' if plan.num_gpus > 1 else ''}"
    lines = ["", f"# {engine} of a worker with role {role}: {gpus}"]
    if plan.by_hand:
        lines.append(f"#   by hand: {plan.by_hand}")
    lines += [f"#   environment {name}={value}" for name, value in plan.environment.items()]
    if plan.unset:
        lines.append(f"#   environment without {', '.join(plan.unset)}")
    lines += [f"#   {name}: {json.dumps(value, default=str)}" for name, value in plan.arguments.items()]
    return lines + [f"#   note: {note}" for note in plan.notes]
