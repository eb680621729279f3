"""The conformance suite: proves a backend right without our help.

Five lines in the tests of a backend run all of it:

    from quantport.testing import BackendConformance


    class TestMine(BackendConformance):
        kind = "mine"

The backend must be installed, so that its entry point is found. Every check is also a plain function over a
``Subject``, in the ``check_*`` modules, for whoever wants to run one by itself. Only this package needs
pytest.
"""

from quantport.testing.subject import Subject
from quantport.testing.suite import BackendConformance

__all__ = ["BackendConformance", "Subject"]
