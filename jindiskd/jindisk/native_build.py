"""Builds `jindiskd.jindisk._native` of native.c, where a compiler and the ipsec-mb library are; see native.py."""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

ffi = FFI()
ffi.cdef("""
    typedef struct {
        size_t key_bytes, key_step;
        const uint8_t *keys;
        uint64_t first, nonce_step;
        size_t aad_bytes;
        const uint8_t *runs;
        size_t run_count;
        uint64_t base;
    } blocks;
    int ready(void);
    size_t count_blocks(const blocks *all, size_t plain_blocks, size_t room);
    void seal(const blocks *all, const uint8_t *plain, uint8_t *sealed, uint8_t *tags);
    size_t unseal(const blocks *all, const uint8_t *sealed, const uint8_t *tags, size_t tag_step, uint8_t *plain);
    size_t data_runs(const uint8_t *plain, size_t count, uint64_t base, uint8_t *runs);
    size_t following(const uint8_t *entries, size_t step, size_t count);
""")
ffi.set_source(
    "jindiskd.jindisk._native",
    Path(__file__).with_name("native.c").read_text(),
    libraries=["IPSec_MB"],
    extra_compile_args=["-O2", "-fstack-protector-strong"],
    py_limited_api=True,
    optional=True,  # without it everything works as well, slower
)
