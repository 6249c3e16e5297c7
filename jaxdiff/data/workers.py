"""What processes that read data for another one have in common."""

import os
import threading
import time


def end_with_parent() -> None:
    """Ends this process soon after the one that started it, however that came to its end."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()
