"""A plugin that offers vLLM's own emulation of NVFP4 to its CPU platform, which has no kernel for that format.

The emulation gives weights and activations back as the format holds them, and multiplies in bf16. vLLM finds the plugin
by the metadata beside this file, in every process it starts, when this folder is on PYTHONPATH; elsewhere it does
nothing.
"""


def offer_emulation() -> None:
    from vllm.platforms import current_platform
    from vllm.platforms.interface import PlatformEnum

    if not current_platform.is_cpu():
        return
    import torch
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.nvfp4.emulation import EmulationNvFp4LinearKernel
    from vllm.model_executor.layers.quantization.utils.nvfp4_emulation_utils import dequantize_to_dtype

    class WeightOnlyEmulationKernel(EmulationNvFp4LinearKernel):  # type: ignore[misc]
        """The same for weights alone: activations stay in 16 bits."""

        def apply_weights(self, layer, x, bias=None):  # type: ignore[no-untyped-def]
            scales = layer.weight_scale, layer.weight_global_scale
            weight = dequantize_to_dtype(layer.weight.view(torch.uint8), *scales, x.dtype, swizzle=False)
            return torch.nn.functional.linear(x, weight, bias)

    linear.register_linear_kernel(EmulationNvFp4LinearKernel, PlatformEnum.CPU, "nvfp4")
    # without activation scales vLLM 0.32 looks at no list: off the newest GPUs it takes Marlin, by this name
    linear.MarlinNvFp4LinearKernel = WeightOnlyEmulationKernel
