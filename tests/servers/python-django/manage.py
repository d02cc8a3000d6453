import os
import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import HttpResponse
from django.urls import path


def index(request):
    return HttpResponse(f"pid={os.getpid()} generation={os.environ['REUSE_RUN_GENERATION']}\n")


urlpatterns = [path("", index)]

settings.configure(DEBUG=True, ROOT_URLCONF=__name__, SECRET_KEY="of a test", USE_TZ=True)
execute_from_command_line(sys.argv)
