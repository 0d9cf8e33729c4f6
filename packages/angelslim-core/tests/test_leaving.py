"""Processes that leave a group end as they would without it, whoever still holds torch's default group.

The file is also a program: it imports torch once and forks pairs of processes, as torchrun would start them, that exchange and end.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import weakref

PAIRS = 4


def pair(held=None):
    """Exit codes of two processes that exchange once and end at once, as Python ends."""
    import torch.distributed as dist

    from angelslim_core.parallel import joined

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if not pids[-1]:
            signal.alarm(200)  # who waits for ever is not well
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            sys.setswitchinterval(100)  # a thread that wants to run Python code does so when this one waits
            with joined("cpu") as group:
                pair.__defaults__ = (dist.group.WORLD,)  # as functions of torch that are imported late
                own = weakref.ref(group._own)
                assert group.gather(rank) == [0, 1]
                for thread in map(int, os.listdir("/proc/self/task")):
                    if thread != os.getpid():  # late, as on a machine under load
                        os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
            sys.exit(3 if own() is None else 4)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_a_process_that_has_left_ends_with_its_own_exit_code():
    """A thread of gloo that holds a tensor while the interpreter ends aborts the process; those that carried the exchanges have ended before."""
    done = subprocess.run([sys.executable, __file__], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert json.loads(done.stdout) == [[3, 3]] * PAIRS, done.stderr[-3000:]


if __name__ == "__main__":
    print(json.dumps([pair() for _ in range(PAIRS)]))
