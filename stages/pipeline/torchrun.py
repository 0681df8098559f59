"""torch's launcher without its traceback: the process that failed has said what was wrong."""

import os
import signal
import sys
from pathlib import Path

from stages.errors import OutOfMemoryError
from stages.runtime import distributed


def run() -> None:
    """Run torchrun with this process's arguments."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    try:
        main()
    except ChildFailedError as error:
        killed = [rank for rank, failure in error.failures.items() if failure.exitcode == -signal.SIGKILL]
        if killed and distributed.FAILURE_ENV in os.environ:
            # The others have reported that they lost their connection to it.
            Path(os.environ[distributed.FAILURE_ENV]).unlink(missing_ok=True)
            distributed.report_failure(
                OutOfMemoryError(
                    f"process {killed[0]} was killed, probably for lack of memory",
                    "the same command resumes; if it happens again, lower per_device_train_batch_size",
                )
            )
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)


if __name__ == "__main__":
    run()
