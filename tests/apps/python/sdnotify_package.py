"""A server that becomes ready by the package sdnotify."""
import sys
from http.server import ThreadingHTTPServer

import sdnotify

from handler import Handler


server = ThreadingHTTPServer(('127.0.0.1', int(sys.argv[1])), Handler)
notifier = sdnotify.SystemdNotifier(debug=True)  # raises errors
notifier.notify('STATUS=warming up')
notifier.notify('READY=1')
server.serve_forever()
