"""Numbers and structures of the NBD protocol, as far as our server and the kernel's client use them.

Source: the NBD protocol document, "Handshake phase" and "Transmission phase". All integers are big-endian. Standard
library only, and nothing else of the engine: the guest's storage process speaks the transmission phase by it.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Mapping

# Handshake
INIT_MAGIC = 0x4E42444D41474943
OPTION_MAGIC = 0x49484156454F5054
OPTION_REPLY_MAGIC = 0x3E889045565A9
GREETING = struct.Struct(">QQH")
CLIENT_FLAGS = struct.Struct(">I")
OPTION = struct.Struct(">QII")
"""Magic, option, length of its data."""
OPTION_REPLY = struct.Struct(">QIII")
"""Magic, option, reply type, length of its data."""
EXPORT_NAME_REPLY = struct.Struct(">QH")
EXPORT_NAME_PADDING = 124
INFO_EXPORT_DATA = struct.Struct(">HQH")
INFO_BLOCK_SIZE_DATA = struct.Struct(">HIII")
U16 = struct.Struct(">H")
U32 = struct.Struct(">I")

FIXED_NEWSTYLE, NO_ZEROES = 1, 2
"""Bits of the handshake flags, the same on both sides."""

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST = 1, 2, 3
OPT_STARTTLS, OPT_INFO, OPT_GO, OPT_STRUCTURED_REPLY = 5, 6, 7, 8
OPT_LIST_META_CONTEXT, OPT_SET_META_CONTEXT = 9, 10

REP_ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP, REP_ERR_POLICY, REP_ERR_INVALID = REP_ERROR + 1, REP_ERROR + 2, REP_ERROR + 3
REP_ERR_UNKNOWN, REP_ERR_SHUTDOWN, REP_ERR_TOO_BIG = REP_ERROR + 6, REP_ERROR + 7, REP_ERROR + 9

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = range(4)
ALLOCATION = b"base:allocation"

# Transmission flags
HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 1 << 1, 1 << 2, 1 << 3
SEND_TRIM, SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN = 1 << 5, 1 << 6, 1 << 7, 1 << 8
SEND_FAST_ZERO = 1 << 11

# Requests
REQUEST_MAGIC = 0x25609513
REPLY_MAGIC = 0x67446698
CHUNK_MAGIC = 0x668E33EF
REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, type, cookie, offset, length."""
REPLY = struct.Struct(">IIQ")
"""Magic, error, cookie."""
CHUNK = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length of the payload."""
U64 = struct.Struct(">Q")
EXTENT = struct.Struct(">II")
"""Length, status."""
CHUNK_ERROR = struct.Struct(">IH")

READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
DONE = 1
CHUNK_NONE, CHUNK_OFFSET_DATA, CHUNK_OFFSET_HOLE, CHUNK_BLOCK_STATUS = 0, 1, 2, 5
CHUNK_ERROR_TYPE = (1 << 15) + 1
STATE_HOLE, STATE_ZERO = 1, 2

PAYLOAD_LIMIT = 32 << 20
"""Bytes of data in a request or reply; announced, and the least that a client without that information may expect."""

_NUMBERS: Mapping[int, int] = {
    errno.EPERM: 1,
    errno.EACCES: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
}


def error_number(exc: OSError) -> int:
    """The protocol's number for an error; what it has no number for is an input or output error."""
    return _NUMBERS.get(exc.errno or errno.EIO, errno.EIO)
