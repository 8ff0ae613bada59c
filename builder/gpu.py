"""The kernels' arithmetic in torch operations, for weights on a GPU: the same bits as `builder.kernels`.

Shapes: O out, I in, H = I / 2, B = I / 16 blocks, K the 16 columns of a block, R the rows of a chunk, G the groups of
columns that share a scale.

Two things would change bits. torch divides a CUDA tensor by a *number* as a product with its reciprocal (aten/src/ATen/
native/cuda/BinaryDivTrueKernel.cu): so every divisor is a tensor on the weight's device. torch.compile divides float32
approximately and fuses multiplications with additions: so the operations stay separate ones, each a pass over a chunk.
"""

from __future__ import annotations

import torch

from builder.compiled import INT4_GROUP, LARGEST_E4M3, SMALLEST_E4M3
from builder.floats import find_float
from builder.kernels import BLOCK, check_matrix

WORKSPACE_BYTES = 256 << 20
BYTES_PER_ELEMENT = 15  # of workspace: ratio 4, code as int32 4 and as uint8 1, sign 1, scales 1, copy of a view 4
# A magnitude's code is the number of these below it. Where a tie goes up, to the even code, stands the float32 before.
E2M1_BOUNDS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
E2M1_BOUNDS[1::2] = E2M1_BOUNDS[1::2].nextafter(torch.tensor(0.0))


def max_magnitude(weight_OI: torch.Tensor) -> float:
    """`builder.kernels.max_magnitude`, where the weight is; no copy of it is made."""
    find_float(weight_OI)  # refuses any other dtype
    if not weight_OI.numel():
        return 0.0
    smallest, largest = weight_OI.detach().aminmax()
    return float(smallest.abs().maximum(largest.abs()))


def pack_nvfp4(
    weight_OI: torch.Tensor, weight_scale_2: float, *, block_scale_floor: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """`builder.kernels.pack_nvfp4`, where the weight is; codes and block scales stay there too.

    Beside them it takes WORKSPACE_BYTES at most, or what a single row takes if that is more.
    """
    check_matrix(weight_OI, BLOCK)
    find_float(weight_OI)
    num_rows, num_columns = weight_OI.shape
    scale_2 = torch.tensor(weight_scale_2, dtype=torch.float32, device=weight_OI.device)
    smallest_scale = SMALLEST_E4M3 if block_scale_floor else 0.0
    packed_OH = torch.empty(num_rows, num_columns // 2, dtype=torch.uint8, device=weight_OI.device)
    scales_OB = torch.empty(num_rows, num_columns // BLOCK, dtype=torch.float8_e4m3fn, device=weight_OI.device)
    step = max(1, WORKSPACE_BYTES // (BYTES_PER_ELEMENT * num_columns))
    chunks = (torch.split(tensor, step) for tensor in (weight_OI.detach(), packed_OH, scales_OB))
    for weight_RI, packed_RH, scales_RB in zip(*chunks, strict=True):
        blocks_RBK = weight_RI.contiguous().unflatten(1, (-1, BLOCK))
        scales_RB.copy_(make_block_scales(blocks_RBK, scale_2, smallest_scale))
        divisors_RB = scales_RB.float() * scale_2  # float32, and so is a quotient with them
        packed_RH.copy_(pack_codes(blocks_RBK / divisors_RB.unsqueeze(2)))
    return packed_OH, scales_OB


def make_block_scales(blocks_RBK: torch.Tensor, scale_2: torch.Tensor, smallest_scale: float) -> torch.Tensor:
    """float8_e4m3fn [R, B]: max |w| / (6 * scale_2) within bounds, 1 where that is 0."""
    scales_RB = blocks_RBK.abs().amax(2).float() / (6 * scale_2)
    bounded_RB = scales_RB.clamp(smallest_scale, LARGEST_E4M3).where(scales_RB != 0, 1)
    return bounded_RB.to(torch.float8_e4m3fn)


def pack_codes(ratios_RBK: torch.Tensor) -> torch.Tensor:
    """uint8 [R, H] of E2M1 codes, to nearest and ties to even, the even column in the low nibble; overwrites ratios."""
    bounds = E2M1_BOUNDS.to(ratios_RBK.device)
    signs_RBK = (ratios_RBK < 0).byte()
    codes_RBK = torch.bucketize(ratios_RBK.abs_(), bounds, out_int32=True).byte()
    codes_RI = codes_RBK.bitwise_or_(signs_RBK << 3).flatten(1)
    return codes_RI[:, ::2] | codes_RI[:, 1::2] << 4


def quantize_fp8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`builder.kernels.quantize_fp8`, where the weight is; codes and scales stay there too."""
    return round_groups(weight_OI, weight_OI.shape[-1], 448.0, (-448.0, 448.0), torch.float8_e4m3fn)


def quantize_int8(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`builder.kernels.quantize_int8`, where the weight is; codes and scales stay there too."""
    return round_groups(weight_OI, weight_OI.shape[-1], 127.5, (-128.0, 127.0), torch.int8)


def pack_int4(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`builder.kernels.pack_int4`, where the weight is; codes and scales stay there too."""
    codes_OI, scales_OG = round_groups(weight_OI, INT4_GROUP, 7.5, (-8.0, 7.0), torch.int8)
    nibbles_OI = codes_OI.add_(8).view(torch.uint8)
    return (nibbles_OI[:, ::2] | nibbles_OI[:, 1::2] << 4).view(torch.int32), scales_OG


def round_groups(
    weight_OI: torch.Tensor, group: int, largest: float, bounds: tuple[float, float], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [O, I] of a dtype and scales [O, I / group] in the weight's own: max |w| / largest, or eps where that is 0.

    Every step rounds to the weight's dtype: ratios, then their bounds, then, for integers, to nearest, ties to even.
    """
    check_matrix(weight_OI, group)
    find_float(weight_OI)
    num_rows, num_columns = weight_OI.shape
    codes_OI = torch.empty(num_rows, num_columns, dtype=dtype, device=weight_OI.device)
    scales_OG = torch.empty(num_rows, num_columns // group, dtype=weight_OI.dtype, device=weight_OI.device)
    divisor = torch.tensor(largest, dtype=weight_OI.dtype, device=weight_OI.device)
    step = max(1, WORKSPACE_BYTES // (BYTES_PER_ELEMENT * num_columns))
    chunks = (torch.split(tensor, step) for tensor in (weight_OI.detach(), codes_OI, scales_OG))
    for weight_RI, codes_RI, scales_RG in zip(*chunks, strict=True):
        groups_RGK = weight_RI.unflatten(1, (-1, group))
        found_RG = groups_RGK.abs().amax(2) / divisor
        scales_RG.copy_(found_RG.where(found_RG != 0, torch.finfo(weight_OI.dtype).eps))
        ratios_RGK = (groups_RGK / scales_RG.unsqueeze(2)).add_(0.0).clamp_(*bounds)  # -0.0 + 0.0 is +0.0
        codes_RI.copy_((ratios_RGK.round_() if dtype == torch.int8 else ratios_RGK).flatten(1))
    return codes_OI, scales_OG
