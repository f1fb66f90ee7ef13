"""Start NVIDIA Triton with npair's model repository, watch it, and stop it in order.

The image, compose, make and the tests all start the server through this file. It stays the parent
of the server and embeds a golden photo once a second, over the HTTP port that clients use. If that
fails for 10 seconds or a Python stub dies, it ends the server and exits with code 1, so that
an orchestrator restarts it. SIGTERM and SIGINT let the server answer what it accepted and
then end it; the exit code is 0 if it did.

Only the standard library, and syntax of Python 3.8: on a bare machine, it says what is missing.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from supervisor import logs, preflight
from supervisor.api import Api
from supervisor.launch import find_triton, scratch_folder
from supervisor.options import Options, parse
from supervisor.preflight import ServeError
from supervisor.probe import Outcome, Probe
from supervisor.procfs import dead_stubs, server_at
from supervisor.supervise import Supervisor


def main() -> int:
    """Returns: the exit code: 0 after an orderly stop, 1 otherwise, with the reason on stderr."""
    options = parse()
    logs.configure(options.log_format)
    try:
        preflight.check_platform()
        if options.check:
            return 0
        options = replace(options, host=preflight.address_of(options.host))
        if options.health:
            check_health(options)
            return 0
        preflight.check_repository(options)
        preflight.check_ports(options)
        with scratch_folder() as scratch:
            return Supervisor(options, find_triton(Path(scratch))).run()
    except ServeError as error:
        logs.log.error(str(error))
        return 1


def check_health(options: Options) -> None:
    """Raises: ServeError if the running server should be replaced; a busy one should not."""
    server = server_at(options.http_port)
    if dead_stubs(server):
        raise ServeError("a Python stub of the model died")
    api = Api(options.host, options.http_port)
    result = Probe(api, options.model_folder, server).run()
    if result.outcome is Outcome.FAILED:
        raise ServeError(result.reason)


if __name__ == "__main__":
    sys.exit(main())
