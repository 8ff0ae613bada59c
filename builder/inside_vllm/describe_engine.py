"""Says which vLLM this is, and what it would run on, as JSON on the last line of standard output."""

import json


def describe() -> dict[str, object]:
    import torch
    import vllm
    from vllm.platforms import current_platform

    cpu = current_platform.is_cpu()
    devices = (
        [] if cpu else [current_platform.get_device_name(index) for index in range(torch.accelerator.device_count())]
    )
    return {"version": vllm.__version__, "platform": current_platform.device_type, "devices": devices}


if __name__ == "__main__":
    print("\n" + json.dumps(describe()))
