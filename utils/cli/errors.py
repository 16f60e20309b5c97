"""Errors that are the user's to mend: one line that names the flag to change, and the exit code."""

import errno
import functools
import os
import select
import sys
from collections.abc import Callable

from data.errors import InputError
from utils import ranks
from utils.device import is_host_memory_full, is_out_of_memory
from utils.matching import guarded
from utils.scoring import NonFiniteLoss

BROKEN_PIPE = 128 + 13  # the exit code of what SIGPIPE ends


def one_line_errors(main):
    """Joins the ranks, and turns an error that is the user's to mend into one line and exit code 2.

    Where nobody reads the output any longer, as with `| head`, the run ends without a word.
    """

    @functools.wraps(main)
    def guarded(argv=None) -> int:
        try:
            try:
                ranks.start()
                main(argv)
                ranks.end()
            finally:
                sys.stdout.flush()  # what is left would fail when the interpreter ends
        except BrokenPipeError:
            if not _drop_unread_output():
                raise
            return BROKEN_PIPE
        except InputError as error:
            return ranks.fail(f"error: {error}", 2)
        except (OSError, RuntimeError, MemoryError) as error:
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                return ranks.fail(f"error: the disk is full ({error}); free some space", 2)
            if not is_out_of_memory(error) and not is_host_memory_full(error):
                raise
            full = "CUDA is out of memory" if is_out_of_memory(error) else "the memory of this machine is full"
            return ranks.fail(
                f"error: {full}; lower --batch_size_train (buffer.py), --pair_chunk (distill.py), "
                "--batch_train (evaluation) or --image_size",
                2,
            )
        except KeyboardInterrupt:
            return ranks.fail("interrupted", 130)
        return 0

    return guarded


def _drop_unread_output() -> bool:
    """Leads stdout and stderr, where their reader is gone, to nowhere; says whether one of them was."""
    gone = [stream for stream in (sys.stdout, sys.stderr) if _reader_is_gone(stream)]
    for stream in gone:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    return bool(gone)


def _reader_is_gone(stream) -> bool:
    try:
        poll = select.poll()
        poll.register(stream, 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))
    except (OSError, ValueError):  # no real file, or a closed one
        return False


def guarded_scoring(call: Callable, iteration: int, args):
    """call(), which trains networks on the set of an iteration of distill.py.

    Raises InputError if they do not fit into memory or their loss is not finite.
    """
    train, test = max(1, min(args.batch_train, args.num_queries) // 2), max(1, args.batch_size_test // 2)
    try:
        return guarded(call, lambda: f"give --batch_train {train} and --batch_size_test {test}")
    except NonFiniteLoss as error:
        # The first pairs have the rates that were given, later ones those that were learned.
        flags = "--lr_img, --lr_txt or --lr_lr" if iteration else "--lr_teacher_img or --lr_teacher_txt"
        raise InputError(
            f"the loss of a network trained on the set of iteration {iteration} became {error.loss}; lower {flags}"
        ) from error
