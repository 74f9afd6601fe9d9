"""Every kernel that the Triton launches can choose, compiled for real GPUs without one, and what its machine code says.

Compiling is what costs time here, so it is done by worker processes, which import this file.
"""

from __future__ import annotations

import inspect
import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from softmask_fast.ops.focal_itc import (
    triton_backward,
    triton_finish,
    triton_kernels,
    triton_negatives,
    triton_sigmoid,
    triton_symmetric,
    triton_symmetric_launch,
)
from softmask_fast.ops.focal_itc import triton_launch as focal_launch
from softmask_fast.ops.soft_masked_attention import triton_kernels as attention_kernels
from softmask_fast.ops.soft_masked_attention import triton_launch as attention_launch
from softmask_fast.ops.soft_masked_attention import triton_plan
from softmask_fast.ops.triton_support import Machine, element_options
from softmask_fast.ops.word_mask import triton_kernels as word_mask_kernels
from softmask_fast.ops.word_mask import triton_launch as word_mask_launch

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Target(NamedTuple):
    arguments: tuple  # of Triton's GPUTarget
    machine: Machine
    matrix_instruction: str  # how it looks in the assembly


TARGETS = {
    "sm_80": Target(("cuda", 80, 32), Machine(80, 163 * 1024), r"\bmma\.sync"),
    "sm_90": Target(("cuda", 90, 32), Machine(90, 227 * 1024), r"\b(wgmma\.mma_async|mma\.sync)"),
    "sm_100": Target(("cuda", 100, 32), Machine(100, 227 * 1024), r"\b(tcgen05\.mma|mma\.sync)"),
    "gfx942": Target(("hip", "gfx942", 64), Machine(0, 64 * 1024), r"\bv_mfma"),
}
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        word_mask_kernels.word_products, word_mask_kernels.word_map, word_mask_kernels.mask_features,
        word_mask_kernels.all_words_statistics, word_mask_kernels.all_words_map, triton_plan.plan,
        attention_kernels.forward, attention_kernels.backward_rows, attention_kernels.backward_key_value,
        attention_kernels.backward_keep, triton_kernels.row_sums, triton_kernels.row_terms,
        triton_negatives.row_negatives, triton_finish.merge, triton_finish.finish, triton_backward.grad_rows,
        triton_backward.grad_keys, triton_backward.chunk_gradient, triton_symmetric.symmetric_sums,
        triton_symmetric.add_parts,
        triton_symmetric.symmetric_finish, triton_symmetric.symmetric_gradient, triton_sigmoid.sigmoid_sums,
        triton_sigmoid.sigmoid_gradient,
    )
}  # fmt: skip
WITHOUT_PRODUCTS = ("plan", "word_products", "word_map", "mask_features", "merge", "finish", "add_parts")
SIGMOID = ("sigmoid_sums", "sigmoid_gradient")
SYMMETRIC = ("symmetric_sums", "symmetric_finish", "symmetric_gradient")
FOCAL = ("row_sums", "row_terms", "row_negatives", "merge", "finish", "grad_rows", "grad_keys", "chunk_gradient")
ATTENTION_FLAGS = {
    "forward": ("HAS_INDEX", "HAS_MASK", "HAS_KEEP", "HAS_BIAS"),
    "backward_rows": ("HAS_INDEX", "HAS_MASK", "HAS_KEEP", "HAS_BIAS"),
    "backward_key_value": ("HAS_INDEX", "HAS_MASK", "HAS_KEEP"),
    "backward_keep": ("HAS_INDEX", "HAS_MASK"),
}
WORD_MASK_FLAGS = {
    "word_products": ("HAS_MASK", "HAS_SUM", "HAS_CAP"),
    "mask_features": (),
    "all_words_statistics": ("HAS_MASK", "HAS_CAP"),
    "all_words_map": ("HAS_MASK", "HAS_SUM", "HAS_CAP"),
}
WORD_MAP_FLAGS = ("HAS_MASK", "HAS_SUM", "NORMALISE")
# these and word_map take any strides; for the others the launch copies what is not dense
STRIDED = ("word_products", "mask_features")
# ORDER, ANY, HAS_TEACHER, HAS_IDS, STATS: as trained, with and without ids or teacher; as much as there is; gammas
# that do not expand; as little as CLIP
FOCAL_FLAGS = (
    (2, False, True, True, True),
    (2, False, True, False, True),
    (2, False, False, True, True),
    (3, True, True, True, True),
    (-1, False, True, True, False),
    (0, False, False, False, False),
    (1, True, False, True, True),
)
FLOATS = ("scale", "soft_cap", "constant_spread", "gamma", "magnify")
POINTERS = {
    "*i1": "mask",
    "*i64": "index word ids key_ids count dominant negative seed",
    "*fp64": "alpha",
    "*i32": "plan boundaries spans places",
    "*fp32": "keep sum statistics delta d_keep logits gradients map temperature sums terms loss state grad_inverse "
    "largest row_parts column_parts row_sums column_sums parts with_products",
}
POINTERS = {f"p_{name}": kind for kind, names in POINTERS.items() for name in names.split()}


class Case(NamedTuple):
    target: str
    kernel: str
    dtype: torch.dtype
    constants: tuple[tuple[str, object], ...]  # with num_warps and other options of the launch
    dense: bool  # 16 divides all strides but those within rows, which are 1

    @property
    def label(self) -> str:
        values = "-".join(f"{name}={int(value)}" for name, value in self.constants)
        kind = str(self.dtype).removeprefix("torch.") + ("" if self.dense else "-strided")
        return f"{self.target}-{self.kernel}-{kind}-{values}"


class Outcome(NamedTuple):
    failure: str  # why it does not compile, or empty
    shared_memory: int = 0
    spills: str = ""  # accesses to local memory: registers that spilled, or arrays that found no place in registers
    matrix_instructions: int = 0


def cases(target: str, everything: bool) -> list[Case]:
    """All that the launches can choose, or of each kernel what a training uses, each once.

    Every tile comes with all that the kernel can do; the usual ones with less of it as well, and for float16.
    """
    machine = TARGETS[target].machine
    found = [
        Case(target, "plan", torch.float32, (("PACKED", packed), ("BLOCK", 1024)), True) for packed in (False, True)
    ]

    def add(kernel, dtype, tiles, flags, dense=True):
        found.append(Case(target, kernel, dtype, tuple((flags | tiles).items()), dense))

    def add_attention(dtype, width, flag):
        for rows, tokens in ((150, 257), (120, 257), (45, 257), (20, 4096)):
            own_keys = attention_launch.can_own_keys(dtype, width, rows, True, False, machine)
            for kernel, names in ATTENTION_FLAGS.items():
                flags = dict.fromkeys(names, flag) | {"EXACT": dtype == torch.float32, "PACKED": False}
                chunks = {"backward_key_value": (1, attention_launch.IMAGES_PER_PROGRAM)}.get(kernel, (None,))
                for chunk in chunks[: 1 + own_keys]:
                    flags |= {} if chunk is None else {"CHUNK": chunk}
                    flags |= {"OWNS_KEYS": False} if kernel == "backward_rows" else {}
                    tiles = attention_launch.tiles(kernel, dtype, width, rows, machine)
                    add(kernel, dtype, tiles, flags)
                    if flag:
                        add(kernel, dtype, tiles, flags | {"PACKED": True})
                if own_keys and kernel == "backward_rows":
                    tiles = attention_launch.tiles(kernel, dtype, width, rows, machine, own_keys, flag)
                    for index in (True, False):
                        own = {"OWNS_KEYS": True, "HAS_MASK": False, "HAS_INDEX": index}
                        if attention_launch.can_own_keys(dtype, width, rows, index, False, machine):
                            add(kernel, dtype, tiles, flags | own)
                            if (
                                index
                                and flag
                                and attention_launch.can_own_keys(
                                    dtype, width, rows, index, False, machine, packed=True
                                )
                            ):
                                add(kernel, dtype, tiles, flags | own | {"PACKED": True})
            for kernel, names in WORD_MASK_FLAGS.items():
                tiles = word_mask_launch.tiles(kernel, dtype, width, tokens, machine)
                add(kernel, dtype, tiles, dict.fromkeys(names, flag))
                add(
                    kernel,
                    dtype,
                    tiles,
                    dict.fromkeys(names, flag) | ({"HAS_SUM": False} if "HAS_SUM" in names else {}),
                )
                if everything and kernel in STRIDED:
                    tiles = word_mask_launch.tiles(kernel, dtype, width, tokens, machine, dense=False)
                    add(kernel, dtype, tiles, dict.fromkeys(names, flag), dense=False)

    def add_focal(dtype, width, order, any_positive, teacher, ids, stats):
        inputs = {"HAS_TEACHER": teacher, "HAS_IDS": ids}
        loss, terms = {"ORDER": order, "ANY": any_positive}, {"TERMS": max(order, 0) + 1}
        flags = {
            "row_sums": inputs | terms | {"ANY": any_positive, "STATS": stats},
            "row_terms": inputs,
            "row_negatives": {"HAS_IDS": ids},
            "grad_rows": inputs | loss | {"WANTS_ROWS": True},
            "grad_keys": inputs | loss,
            "chunk_gradient": inputs | loss,
        }
        crowded = any_positive or order not in (0, 1, 2)
        given = (dtype, width, machine, crowded, teacher, ids)
        in_chunks = width > focal_launch.tiles("grad_rows", *given)["BLOCK_C"]
        for kernel in flags:
            if kernel in (("grad_rows", "grad_keys") if in_chunks else ("chunk_gradient",)):
                continue
            add(kernel, dtype, focal_launch.tiles(kernel, *given), flags[kernel])
        rows = {"HAS_TEACHER": teacher, "BLOCK_B": focal_launch.MERGE_ROWS}
        add("merge", torch.float32, rows, terms)
        add("finish", torch.float32, rows, loss | {"STATS": stats})

    def add_word_map(tokens, flags, dense=True):
        tiles = word_mask_launch.tiles("word_map", torch.float32, 0, tokens, machine)
        add("word_map", torch.float32, tiles, dict(zip(WORD_MAP_FLAGS, flags, strict=True)), dense)

    def add_symmetric(dtype, width, order):
        for kernel in ("symmetric_sums", "symmetric_gradient"):
            add(kernel, dtype, triton_symmetric_launch.tiles(width, machine), {})
        add("symmetric_finish", dtype, triton_symmetric_launch.finish_tiles(width, machine), {"ORDER": order})
        add("add_parts", torch.float32, {"BLOCK_B": triton_symmetric_launch.ADD_ROWS}, {"FIRST": False})

    def add_sigmoid(dtype, width, order, ids, both):
        for kernel in SIGMOID:
            flags = {"ORDER": order, "HAS_IDS": ids, "BOTH": both}
            add(kernel, dtype, triton_sigmoid.tiles(dtype, width, machine), flags)

    for tokens in (257, 577, 1025, 4096):
        add_word_map(tokens, (True, False, True))
        add_word_map(tokens, (True, True, False))
    for dtype in (torch.bfloat16, torch.float32):
        add_attention(dtype, 64, True)
        add_focal(dtype, 256, *FOCAL_FLAGS[0])
        add_sigmoid(dtype, 256, 0, True, True)
    add_symmetric(torch.bfloat16, 256, 0)
    if everything:
        for tokens in (16, 50, 100, 197, 257, 577, 1025, 4096, 8192, 16384):
            for flags in itertools.product((False, True), repeat=3):
                add_word_map(tokens, flags)
            add_word_map(tokens, (True, False, True), dense=False)
        add_attention(torch.float16, 64, True)
        add_focal(torch.float16, 256, *FOCAL_FLAGS[0])
        for dtype, width in itertools.product((torch.bfloat16, torch.float16), (16, 32, 48, 80, 256)):
            for order in (-1, 0, 1, 2, 3) if width == 256 else (2,):
                add_symmetric(dtype, width, order)
        for dtype in (torch.bfloat16, torch.float32):
            for width, flag in ((64, False), (16, True), (32, True), (128, True)):
                add_attention(dtype, width, flag)
            for width, order, ids in itertools.product((16, 32, 256), (-1, 0, 2), (False, True)):
                for both in (False, True):
                    add_sigmoid(dtype, width, order, ids, both)
            for width, flags in itertools.product((16, 32, 64, 128, 256, 512, 1024), FOCAL_FLAGS):
                if width == 256 or flags in FOCAL_FLAGS[:4]:
                    add_focal(dtype, width, *flags)
    return list(dict.fromkeys(found))


def compile_case(case: Case):
    """The compiled kernel, specialised as a launch specialises it."""
    kernel, options = KERNELS[case.kernel], dict(case.constants)
    launch = {name: options.pop(name) for name in ("num_warps", "num_stages", "maxnreg") if name in options}
    values = options | element_options(case.dtype)
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(inspect.signature(kernel.fn).parameters):
        if name in values:
            signature[name], constants[name] = "constexpr", values[name]
        elif options.get("TMA") and name in ("p_image", "p_text"):
            rows = options["BLOCK_B" if name == "p_image" else "BLOCK_K"]
            signature[name] = f"tensordesc<{TYPES[case.dtype][1:]}[{rows}, {options['BLOCK_D']}]>"
        elif name.startswith("p_"):
            signature[name] = POINTERS.get(name, TYPES[case.dtype])
            if case.kernel in FOCAL + SYMMETRIC + SIGMOID and name == "p_grad":  # of the losses, elsewhere of rows
                signature[name] = "*fp32"
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif name in FLOATS:
            signature[name] = "fp32"
        elif case.dense and re.search(r"_[dc]$|^(keep|mask)_n$", name):
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32"
            odd = ("mask_b", "parts_n", "row_parts_n")  # strides that are no multiple of 16
            strides = case.dense and re.search(r"_[bshlnm]$", name) and name not in odd
            if strides or name in ("C", "D", "columns", "KEYS_PER_SPLIT"):
                attributes[(place,)] = [["tt.divisibility", 16]]
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    target = triton.backends.compiler.GPUTarget(*TARGETS[case.target].arguments)
    return triton.compile(source, target=target, options=launch)


def examine(case: Case) -> Outcome:
    try:
        compiled = compile_case(case)
    except Exception as failure:
        return Outcome(f"{type(failure).__name__}: {failure}"[:2000])
    target = TARGETS[case.target]
    if target.machine.capability:
        code, accesses = compiled.asm["ptx"], {}
        with tempfile.NamedTemporaryFile(suffix=".cubin") as binary:
            binary.write(compiled.asm["cubin"])
            binary.flush()
            # a stack may also be what calls of functions take: loads from it and stores to it are what costs
            if "STACK:0 " not in tool("cuobjdump", "--dump-resource-usage", binary.name):
                machine_code = tool("nvdisasm", "-c", binary.name)
                accesses = {name: len(re.findall(rf"\b{name}\b", machine_code)) for name in ("STL", "LDL")}
    else:
        code = compiled.asm["amdgcn"]
        # scalar registers may spill into lanes of vector registers; nothing may go to memory
        usage = re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", code)
        accesses = {name: int(count) for name, count in usage} or {"no usage": 1}
    spills = ", ".join(f"{count} {name}" for name, count in accesses.items() if count)
    return Outcome("", compiled.metadata.shared, spills, len(re.findall(target.matrix_instruction, code)))


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def start_worker(cache: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = cache
    torch.set_num_threads(1)
