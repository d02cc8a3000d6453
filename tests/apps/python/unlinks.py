"""unlinks.py FOLDER: says that it is ready, then removes a file that doesn't exist, again and again, and adds to FOLDER/unlinks how
many milliseconds each took. While FOLDER/flood exists, it also prints lines as fast as it can."""
import os
import sys
import threading
import time

folder = sys.argv[1]


def flood():
    while True:
        if os.path.exists(os.path.join(folder, 'flood')):
            print('a line of many ' * 5, flush=True)
        else:
            time.sleep(0.01)


threading.Thread(target=flood, daemon=True).start()
print('begins', flush=True)
os.write(int(os.environ['READY_FD']), b'\n')
with open(os.path.join(folder, 'unlinks'), 'a', buffering=1) as log:
    while True:
        begun = time.monotonic()
        try:
            os.unlink(os.path.join(folder, 'missing'))
        except FileNotFoundError:
            pass
        log.write('{:.3f}\n'.format((time.monotonic() - begun) * 1000))
        time.sleep(0.01)
