"""Runs a command for which the system calls of the first argument, separated by commas, fail with the errno of the second.
`passrights` is setsockopt of SO_PASSRIGHTS."""
import ctypes
import errno
import os
import platform
import struct
import sys

numbers = {
    'seccomp': {'x86_64': 317, 'aarch64': 277},
    'pidfd_getfd': {'x86_64': 438, 'aarch64': 438},
    'readlinkat': {'x86_64': 267, 'aarch64': 78},
    'ptrace': {'x86_64': 101, 'aarch64': 117},
    'passrights': {'x86_64': 54, 'aarch64': 208},
}
code = getattr(errno, sys.argv[2])
instructions = [
    struct.pack('=HBBI', 0x20, 0, 0, 0),  # load the number of the system call
]
for name in sys.argv[1].split(','):
    only_option = [
        struct.pack('=HBBI', 0x20, 0, 0, 32),  # load the third argument
        struct.pack('=HBBI', 0x15, 0, 1, 83),  # SO_PASSRIGHTS
    ] if name == 'passrights' else []
    instructions += [
        struct.pack('=HBBI', 0x15, 0, 1 + len(only_option), numbers[name][platform.machine()]),
        *only_option,
        struct.pack('=HBBI', 0x06, 0, 0, 0x00050000 | code),  # SECCOMP_RET_ERRNO
    ]
instructions.append(struct.pack('=HBBI', 0x06, 0, 0, 0x7FFF0000))  # SECCOMP_RET_ALLOW
code = ctypes.create_string_buffer(b''.join(instructions))


class Program(ctypes.Structure):
    _fields_ = [('len', ctypes.c_ushort), ('filter', ctypes.c_void_p)]


program = Program(len(instructions), ctypes.addressof(code))
libc = ctypes.CDLL(None, use_errno=True)
for arguments in [(38, 1, 0, 0, 0), (22, 2, ctypes.byref(program))]:  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
    if libc.prctl(*arguments) != 0:
        sys.exit(os.strerror(ctypes.get_errno()))
os.execvp(sys.argv[3], sys.argv[3:])
