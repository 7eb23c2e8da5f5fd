"""vLLM's OpenAI server in a process of its own, on this machine alone."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor


class HTTPError(Exception):
    """The server's answer was no success."""


class Server:
    """A server of one checkpoint, called 'base', until the block ends."""

    def __init__(self, folder, log):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        options = {
            "model": folder, "served-model-name": "base", "dtype": "float32",
            "host": "127.0.0.1", "port": port, "max-model-len": 64, "max-loras": 2,
            "max-lora-rank": 8, "max-num-seqs": 8,
        }  # fmt: skip
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        self.command += [f"--{k}={v}" for k, v in options.items()]
        self.command += ["--enable-lora", "--enforce-eager"]

    def __enter__(self):
        settings = {
            "HF_HUB_OFFLINE": "1",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with open(self.log, "w") as out:
            self.process = subprocess.Popen(
                self.command, env=os.environ | settings, stdout=out, stderr=out
            )
        try:
            self._wait(time.monotonic() + 600)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self, until):
        while True:
            try:
                return self._ask("/health")
            except (HTTPError, OSError):
                if self.process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError(self.log.read_text()[-4000:]) from None
                time.sleep(0.5)

    def __exit__(self, *error):
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _ask(self, path, content=None):
        data = None if content is None else json.dumps(content).encode()
        kind = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, kind)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.read()
        except urllib.error.HTTPError as error:
            raise HTTPError(error.read().decode()) from None

    def models(self):
        """What can be asked for."""
        return sorted(x["id"] for x in json.loads(self._ask("/v1/models"))["data"])

    def load(self, name, folder):
        """Adds an adapter while the server runs."""
        content = {"lora_name": name, "lora_path": str(folder)}
        self._ask("/v1/load_lora_adapter", content)

    def unload(self, name):
        """Takes it away again."""
        self._ask("/v1/unload_lora_adapter", {"lora_name": name})

    def complete(self, names, prompt, new):
        """The greedy tokens of each of the names, asked at once."""
        with ThreadPoolExecutor(len(names)) as threads:
            return list(threads.map(lambda name: self._one(name, prompt, new), names))

    def _one(self, name, prompt, new):
        content = {
            "model": name, "prompt": prompt, "max_tokens": new, "temperature": 0,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        answer = json.loads(self._ask("/v1/completions", content))
        return answer["choices"][0]["token_ids"]
