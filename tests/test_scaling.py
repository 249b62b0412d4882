"""docs/scaling.md: its tables are those of the JSON, its launch lines are what the launchers take."""

import json
import re
import shlex
from pathlib import Path

import accelerate
import pytest
from accelerate.commands.launch import launch_command_parser
from packaging.version import Version
from torch.distributed.run import get_args_parser

ROOT = Path(__file__).parents[1]
DOC = (ROOT / "docs" / "scaling.md").read_text()
RESULT = json.loads((ROOT / "benchmarks" / "results" / "scaling-cpu.json").read_text())
TABLES = [name for name, part in RESULT.items() if isinstance(part, list)]
LINES = re.findall(r"```bash\n(.*?)\n```", DOC, flags=re.DOTALL)


@pytest.mark.parametrize("name", TABLES)
def test_table_of_the_doc_is_that_of_the_json(name):
    for row in RESULT[name]:
        cells = [f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row.values()]
        assert f"| {' | '.join(cells)} |" in DOC


def test_messages_are_as_large_for_any_number_of_ranks_and_as_the_doc_says():
    for row in RESULT["messages of a step"]:
        ranks = {row[f"bytes of {count} rank(s)"] for count in (1, 2, 4)}
        assert len(ranks) == 1
        if row["label term"] == "class_mean" and row["classes"] <= 128:
            assert ranks == {4 * row["classes"] * (row["classes"] + 1)}
        elif row["label term"] == "class_mean":
            assert (ranks.pop() - 8 * row["classes"]) % (4 * (row["classes"] + 1)) == 0
        else:
            assert ranks == {0}


@pytest.mark.parametrize("line", LINES)
def test_launch_line_is_taken_by_the_launcher(line, request):
    if "--fsdp_version" in line and Version(accelerate.__version__) < Version("1.6"):
        request.applymarker(pytest.mark.xfail(raises=SystemExit, strict=True, reason="FSDP2 came with Accelerate 1.6"))
    program, *words = shlex.split(line.replace("\\\n", "").replace("$NODE", "1").replace("$MAIN", "10.0.0.1"))
    if program == "accelerate":
        args = launch_command_parser().parse_args(words[1:])
        assert (args.num_machines, args.num_processes, args.machine_rank) == (2, 16, 1)
        assert args.training_script == "train.py"
    else:
        args = get_args_parser().parse_args(words)
        assert (args.nnodes, args.node_rank, args.training_script) == ("2", 1, "train.py")


def test_there_are_launch_lines_for_each_way():
    assert len(LINES) == 4
    for flag in ("--multi_gpu", "--use_fsdp", "--use_deepspeed", "torchrun"):
        assert sum(flag in line for line in LINES) == 1
