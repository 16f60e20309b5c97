"""Errors that are the user's to mend: one line, and the exit code."""

import errno
import functools

from data.errors import InputError
from utils import ranks
from utils.device import is_out_of_memory


def one_line_errors(main):
    """Joins the ranks, and turns an error that is the user's to mend into one line and exit code 2."""

    @functools.wraps(main)
    def guarded(argv=None) -> int:
        try:
            ranks.start()
            main(argv)
            ranks.end()
        except InputError as error:
            return ranks.fail(f"error: {error}", 2)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            return ranks.fail(f"error: the disk is full ({error}); free some space", 2)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return ranks.fail(
                "error: CUDA is out of memory; lower --batch_size_train (buffer.py), --pair_chunk (distill.py), "
                "--batch_train (evaluation) or --image_size",
                2,
            )
        except KeyboardInterrupt:
            return ranks.fail("interrupted", 130)
        return 0

    return guarded
