"""A root file system that is just enough for a build, and a kernel that is just enough for a machine."""

from __future__ import annotations

import io
import os
import tarfile

MODULES = (
    "virtio_pci",
    "virtio_blk",
    "vmw_vsock_virtio_transport",
    "dm-mod",
    "dm-crypt",
    "xts",
    "nbd",
    "ext4",
)
RELEASE = "6.1.0-13-test"


def root_archive(*, kernel: bytes = b"kernel" + bytes(70_000) + b"end", padding_bytes: int = 0) -> bytes:
    """A tar archive of what a build asks of a root file system, and padding that takes time to encrypt."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:

        def folder(name: str) -> None:
            info = tarfile.TarInfo(name)
            info.type, info.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(info)

        def file(name: str, content: bytes) -> None:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))

        base = f"usr/lib/modules/{RELEASE}"
        for name in ("etc", "usr", "usr/bin", "usr/lib", "usr/lib/modules", "boot", "dev", base, f"{base}/kernel"):
            folder(name)
        link = tarfile.TarInfo("lib")
        link.type, link.linkname = tarfile.SYMTYPE, "usr/lib"
        tar.addfile(link)
        file("etc/os-release", b'NAME="Test"\nPRETTY_NAME="Test Linux 1"\n')
        file("etc/fstab", b"UUID=0b5c1f0e-7a63-4c39-9d0a-2d6a3c1f9e11 / ext4 rw 0 1\n")
        lines = []
        for module in MODULES:
            file(f"{base}/kernel/{module}.ko", b"\x7fELF" + module.encode() * 50)
            lines.append(f"kernel/{module}.ko:" + (" kernel/dm-mod.ko" if module == "dm-crypt" else ""))
        file(f"{base}/modules.dep", ("\n".join(lines) + "\n").encode())
        for name in ("modules.builtin", "modules.order"):
            file(f"{base}/{name}", b"")
        file(f"boot/vmlinuz-{RELEASE}", kernel)
        if padding_bytes:
            file("usr/padding", os.urandom(1 << 20) * (padding_bytes >> 20))
    return out.getvalue()


def idle_kernel() -> bytes:
    """A kernel by its header (Documentation/arch/x86/boot.rst) that halts: the machine stays on and does nothing."""
    head = bytearray(1024)
    head[0x1F1] = 1  # sectors of the setup part
    head[0x1F4:0x1F8] = (0x1000 // 16).to_bytes(4, "little")
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x208] = b"HdrS" + (0x020C).to_bytes(2, "little")
    head[0x211] = 1  # loaded high
    head[0x22C:0x230] = (0x7FFFFFFF).to_bytes(4, "little")  # the initrd may lie anywhere
    head[0x238:0x23C] = (2047).to_bytes(4, "little")
    return bytes(head) + b"\xfa\xf4\xeb\xfd" * 1024  # cli; hlt; jmp to the hlt
