"""One client process of the soak: streams answers from a server at random times until it is killed.

Each answer is a line of JSON on stdout: seconds to the first token, in all, tokens, and what went wrong.
"""

import http.client
import json
import sys
import threading
import time

import numpy as np

THREADS = 32


def main() -> int:
    """argv: port, requests a second, users, Zipf's exponent, least and most prompt tokens, and new ones, seed."""
    port, rate, users, exponent, *sizes, seed = (float(each) for each in sys.argv[1:])
    rng, room = np.random.default_rng(int(seed)), threading.Semaphore(THREADS)
    weights = np.arange(1, int(users) + 1) ** -exponent
    weights /= weights.sum()
    due = time.monotonic()
    while True:
        due += rng.exponential(1 / rate)
        time.sleep(max(0.0, due - time.monotonic()))
        prompt = rng.integers(0, 256, rng.integers(int(sizes[0]), int(sizes[1]) + 1)).tolist()
        body = {"model": f"user-{rng.choice(int(users), p=weights):06d}", "prompt": prompt, "stream": True}
        body["max_tokens"] = int(rng.integers(int(sizes[2]), int(sizes[3]) + 1))
        if room.acquire(blocking=False):  # else this client is the slow one: it asks for no more than it can hear
            threading.Thread(target=_ask, args=(int(port), body, due, room), daemon=True).start()


def _ask(port: int, body: dict, due: float, room: threading.Semaphore) -> None:
    first, tokens, wrong = None, 0, ""
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            wrong = f"{answer.status}: {answer.read(200).decode('utf-8', 'replace')}"
        for line in iter(answer.readline, b"") if not wrong else ():
            if line.startswith(b"data: {"):
                part = json.loads(line[6:])
                first = first or time.monotonic()
                tokens += 1
                if "error" in part:
                    wrong = part["error"]["message"]
            elif line.startswith(b"data: [DONE]"):
                break
        connection.close()
    except OSError as error:
        wrong = f"{type(error).__name__}: {error}"
    finally:
        room.release()
    end = time.monotonic()
    record = {"first_s": (first or end) - due, "whole_s": end - due, "tokens": tokens, "wrong": wrong}
    sys.stdout.write(json.dumps(record) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
