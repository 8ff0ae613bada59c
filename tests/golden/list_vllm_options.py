"""The options and variables of the vLLM that is installed where this runs, as JSON for builder/data.

PYTHON_OF_VLLM tests/golden/list_vllm_options.py builder/data/vllm-MAJOR.MINOR-cli.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def list_options() -> dict[str, Any]:
    import vllm
    from vllm import envs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    parser = make_arg_parser(FlexibleArgumentParser(add_json_tip=False))
    flags = {
        flag: describe_option(action)
        for action in parser._actions
        for flag in action.option_strings
        if flag.startswith("--")
    }
    return {
        "attention_backends": list(AttentionBackendEnum.__members__),
        "env": sorted(envs.environment_variables),
        "flags": dict(sorted(flags.items())),
        "quantization_methods": list(QUANTIZATION_METHODS),
        "vllm": vllm.__version__.partition("+")[0],
    }


def describe_option(action: Any) -> dict[str, Any]:
    choices = action.choices and list(action.choices)
    default = action.default if is_json(action.default) else repr(action.default)[:200]
    kind = getattr(action.type, "__name__", None)
    return {"choices": choices, "default": default, "nargs": action.nargs, "type": kind}


def is_json(value: object) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(list_options(), indent=1, sort_keys=True) + "\n", "utf-8")
