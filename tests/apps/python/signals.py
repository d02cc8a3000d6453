"""Prints `ready`, then the name of each signal that it gets, or the number of a real-time signal. SIGINT ends it, unless the argument is `stays`."""
import os
import signal
import sys
import time

ends = sys.argv[1:] != ['stays']


def say(line):
    os.write(1, 'generation={} {}\n'.format(os.environ.get('REUSE_RUN_GENERATION'), line).encode())


def got(number, _frame):
    say('SIG{}'.format(number) if number > 31 else signal.Signals(number).name)
    if number == signal.SIGINT and ends:
        sys.exit(0)


for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
    signal.signal(number, got)
say('ready')
os.write(int(os.environ['READY_FD']), b'\n')
while True:
    time.sleep(0.1)
