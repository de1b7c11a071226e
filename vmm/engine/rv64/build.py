"""Compile the hart ahead of time: ``python -m vmm.engine.rv64.build FILE``.

numba turns the hart's functions into LLVM modules; this program links them into one, hides all but the entry points,
optimises the whole once and writes an object file. Later processes load that with llvmlite alone and never import
numba.

The program reports its progress as lines ``<fraction> <what>`` on standard output. The file is written beside its final
name and moved there when complete.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from vmm.errors import EngineError

#: Entry points: module and function. Their arguments and results are int64.
ENTRY_POINTS = {
    "run": "loop",
    "translate": "mmu",
    "flush_tlb": "mmu",
    "select_tlbs": "mmu",
    "read_csr": "system",
    "write_csr": "system",
    "update_timer": "system",
    "post": "requests",
    "overwrite_range": "requests",
}

#: What compiled code may call in the host process.
HOST_FUNCTIONS = ("clock_gettime", "sched_yield", "fma", "fmaf", "memset", "memcpy")

#: A file of compiled code: this, the SHA-256 digest of the rest, symbols as one line of JSON, the object file.
MAGIC = b"RV64OBJ2"


def _say(fraction: float, what: str) -> None:
    print(f"{fraction:.2f} {what}", flush=True)


def _compile() -> tuple[dict[str, Any], list[Any]]:
    """Compiled functions by name of entry point, and the groups of rows."""
    _say(0.02, "loading numba")
    from vmm.engine.rv64 import native

    native.python_face = False
    _say(0.08, "arithmetic and floating point")
    for module in ("arithmetic", "floating"):  # a module's functions are compiled when it is imported
        importlib.import_module(f"vmm.engine.rv64.{module}")

    _say(0.30, "address translation")
    from vmm.engine.rv64 import mmu

    _say(0.38, "traps and registers")
    from vmm.engine.rv64 import requests, system

    _say(0.45, "instructions")
    from vmm.engine.rv64 import executor, loop

    modules = {"mmu": mmu, "system": system, "requests": requests, "loop": loop}
    functions: dict[str, Any] = {name: getattr(modules[module], name) for name, module in ENTRY_POINTS.items()}
    return functions, executor.compile_groups()


def _link(functions: dict[str, Any], groups: list[Any]) -> tuple[Any, dict[str, str]]:
    """One LLVM module of all functions, in which only the entry points are visible; and their symbols."""
    import llvmlite.binding as llvm

    from vmm.engine.rv64 import decoder, executor, fused, fusion, mmu, operands, shadow, system
    from vmm.engine.rv64.native import compiled_functions

    def symbol(function: Any) -> str:
        return compiled_functions[function].symbol

    symbols = {name: symbol(function) for name, function in functions.items()}
    linked = llvm.parse_assembly(executor.straight_module([symbol(group) for group in groups]))
    for text in dict.fromkeys(text for compiled in compiled_functions.values() for text in compiled.texts):
        # numba marks signed arithmetic as never overflowing; a hart's wraps.
        module = llvm.parse_assembly(text.replace(" nsw ", " "))
        for function in module.functions:
            if not function.is_declaration:
                function.linkage = "weak_odr"
        linked.link_in(module)
    inlined = {symbol(function) for function in [*operands.INLINED, *fused.INLINED, *groups]}
    modules = (system, mmu, decoder, operands, fused, fusion, shadow)
    called = {symbol(function) for module in modules for function in module.CALLED}
    for function in linked.functions:
        if function.is_declaration:
            continue
        function.linkage = "external" if function.name in symbols.values() else "internal"
        if function.name in inlined:
            function.add_function_attribute("alwaysinline")
        elif function.name in called:
            function.add_function_attribute("noinline")
    return linked, symbols


def _emit(module: Any) -> bytes:
    """Optimise for this machine's CPU and make an object file."""
    import llvmlite.binding as llvm

    from vmm.engine.rv64.library import target_machine

    # A copy of the dispatching jump at the end of every row: the branch predictor then knows what follows what.
    for option in ("-tail-dup-pred-size=1000", "-tail-dup-succ-size=1000"):
        llvm.set_option("hart", option)
    machine = target_machine()
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_vectorization = False
    options.slp_vectorization = False
    builder = llvm.create_pass_builder(machine, options)
    passes = builder.getModulePassManager()
    passes.run(module, builder)
    for function in module.functions:
        if function.is_declaration and not function.name.startswith(("llvm.", *HOST_FUNCTIONS)):
            raise EngineError(f"the compiled hart calls {function.name!r}, which nothing defines")
    if os.environ.get("KATA_LAB_KEEP_ASSEMBLY"):
        Path(os.environ["KATA_LAB_KEEP_ASSEMBLY"]).write_text(machine.emit_assembly(module))
    return bytes(machine.emit_object(module))


def main(target: Path) -> None:
    """Compile and write the object file with its table of symbols."""
    functions, groups = _compile()
    _say(0.65, "linking")
    module, symbols = _link(functions, groups)
    _say(0.70, "optimising")
    code = _emit(module)
    _say(0.98, "writing")
    content = json.dumps(symbols).encode() + b"\n" + code
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            file.write(MAGIC + hashlib.sha256(content).digest() + content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
    _say(1.0, "done")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
