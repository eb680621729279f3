"""Compiles a Python body to machine code in memory: numba writes LLVM's assembly, LLVM compiles and loads it.

The code holds one entry and calls nothing but ``RUNTIME``. numba's wrapper, which raises Python's errors, is
left out: bodies raise none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
import numba

from quantport_cpu.jit.target import host_target

# numba does it when it first compiles, which a process that finds its kernels in the cache never does
llvm.initialize_native_target()
llvm.initialize_native_asmprinter()

ENTRY = "kernel"
RUNTIME = ("memcpy", "memmove", "memset", "sched_yield")


def target_machine(triple: str = "", name: str = "", features: str = "") -> Any:
    """LLVM's compiler for a processor; without arguments, for the one that numba compiles for."""
    if not triple:
        triple, name, features = llvm.get_process_triple(), host_target().name, host_target().listed
    make = llvm.Target.from_triple(triple).create_target_machine
    return make(cpu=name, features=features, opt=3, reloc="static", codemodel="jitdefault", jit=True)


def assembly(body: Callable[[Any], None]) -> str:
    """LLVM's assembly of a body as ``void kernel(int64)``, for the processor of ``target.host_target``.

    Raises:
        RuntimeError: the body would call something that is not in ``RUNTIME``.
    """
    compiled = numba.cfunc("void(int64)", error_model="numpy", boundscheck=False)(body)
    native = compiled.native_name.removeprefix("cfunc.")
    entry = f"""
define void @{ENTRY}(i64 %frame) {{
  %value = alloca ptr
  %error = alloca ptr
  %status = call i32 @"{native}"(ptr %value, ptr %error, i64 %frame)
  ret void
}}
"""
    module = llvm.parse_assembly(compiled.inspect_llvm() + entry)
    for function in module.functions:
        if not function.is_declaration and function.name != ENTRY:
            function.linkage = "internal"
    passes = llvm.create_new_module_pass_manager()
    passes.add_global_dead_code_eliminate_pass()
    passes.run(module, llvm.create_pass_builder(target_machine(), llvm.create_pipeline_tuning_options()))
    called = {f.name for f in module.functions if f.is_declaration and not f.name.startswith("llvm.")}
    if not called <= set(RUNTIME):
        raise RuntimeError(f"{body.__qualname__} calls {', '.join(sorted(called - set(RUNTIME)))}")
    return str(module)


def compile_object(text: str) -> bytes:
    """The object file of an assembly."""
    code: bytes = target_machine().emit_object(llvm.parse_assembly(text))
    return code


def load(code: bytes) -> tuple[Any, int]:
    """Loads an object file: returns what keeps it in memory, and the address of its ``kernel``."""
    for name in RUNTIME:
        llvm.add_symbol(name, ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value)
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), target_machine())
    engine.set_object_cache(getbuffer_func=lambda _: code)  # in place of compiling the empty module
    engine.finalize_object()
    return engine, engine.get_function_address(ENTRY)
