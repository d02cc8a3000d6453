"""Reads an example of the README or of docs with the parser of the tool that it is for, and prints the result as JSON.
Exits with an error if the example is wrong.

dockerfile: BuildKit's own parser
deployment: Kubernetes' JSON Schemas, of 1.30 and of the newest version; unknown fields are errors
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
