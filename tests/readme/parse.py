"""Reads an example of the README by the parser of those whom it is meant for, and writes what that made of it as
JSON. What is wrong ends it.

dockerfile: BuildKit's own parser
deployment: Kubernetes' JSON Schemas, of 1.30 and of now, where unknown fields are wrong
compose:    docker-compose config
"""
import json
import subprocess
import sys

what, file = sys.argv[1:]
if what == 'dockerfile':
    import dockerfile
    found = [command._asdict() for command in dockerfile.parse_file(file)]
else:
    import yaml
    text = open(file).read()
    if what == 'compose':
        text = subprocess.run(
            ['docker-compose', '-f', file, 'config'], check=True, stdout=subprocess.PIPE, text=True).stdout
    found = yaml.safe_load(text)
    if what == 'deployment':
        import kubernetes_validate
        for version in '1.30', kubernetes_validate.latest_version():
            kubernetes_validate.validate(found, version, strict=True)
print(json.dumps(found))
