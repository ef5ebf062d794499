"""`lora-ext doctor`: why lora_ext does not work here, or not on the GPU, and what helps."""

from __future__ import annotations

from dataclasses import asdict

import click

from lora_ext.cli.answers import Answer, counted, telling


@click.command(short_help="Find why lora_ext does not work here, and what helps.")
@telling
def doctor() -> Answer:
    """Find what keeps lora_ext from working here, or from using the GPU, and say what helps.

    It looks at torch, the package that Python finds in this folder, its compiled extension, the
    compiler, nvcc and the GPU, and works where `import lora_ext` fails. Exit code 1 if something
    has to be done.

    JSON: problems (how many), checks: a list of check, status ("ok", "note" or "problem"), says,
    cure ("" if there is nothing to do).
    """
    from lora_ext.cli.facts import collect
    from lora_ext.cli.findings import NOTE, PROBLEM, examine

    findings = examine(collect())
    problems = [one for one in findings if one.status == PROBLEM]
    lines = []
    for one in findings:
        mark = {PROBLEM: "PROBLEM", NOTE: "note"}.get(one.status, "ok")
        lines.append(f"{mark:<8} {one.check}: {one.says}")
        if one.cure:
            lines.append(f"{'':<8}   -> {one.cure}")
    found = f"{counted(len(problems), 'problem')} found"
    lines.append(found if problems else "lora_ext works here")
    data = {"problems": len(problems), "checks": [asdict(one) for one in findings]}
    return Answer(data, "\n".join(lines), ok=not problems)
