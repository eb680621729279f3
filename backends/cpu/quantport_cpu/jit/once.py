from __future__ import annotations
import threading
from functools import wraps

def once(function):
    lock, made = threading.RLock(), {}
    @wraps(function)
    def call(*args):
        if args not in made:
            with lock:
                if args not in made:
                    made[args] = function(*args)
        return made[args]
    return call
