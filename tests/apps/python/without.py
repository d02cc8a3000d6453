"""Runs a command for which the system call of the first argument fails with the errno of the second one."""
import ctypes
import errno
import os
import platform
import struct
import sys

numbers = {'seccomp': {'x86_64': 317, 'aarch64': 277}, 'pidfd_getfd': {'x86_64': 438, 'aarch64': 438}}
number = numbers[sys.argv[1]][platform.machine()]
code = getattr(errno, sys.argv[2])
instructions = [
    struct.pack('=HBBI', 0x20, 0, 0, 0),  # load the number of the system call
    struct.pack('=HBBI', 0x15, 0, 1, number),
    struct.pack('=HBBI', 0x06, 0, 0, 0x00050000 | code),  # SECCOMP_RET_ERRNO
    struct.pack('=HBBI', 0x06, 0, 0, 0x7FFF0000),  # SECCOMP_RET_ALLOW
]
code = ctypes.create_string_buffer(b''.join(instructions))


class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]


program = Program(len(instructions), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
for arguments in [(38, 1, 0, 0, 0), (22, 2, ctypes.byref(program))]:  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
    if libc.prctl(*arguments) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[3], sys.argv[3:])
