"""What the compiled quantizers of the CPU room leave to the reference."""

DECLINED = frozenset({"bf16", "int4_hqq", "q4_1", "q5_0", "q5_1", "q2_k", "q3_k"})
