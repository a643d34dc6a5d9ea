"""A reward that lives in another environment: copy this file there, put the model into `score`, run it.

    python reward_server_wrapper.py 8000                         # there; needs Pillow alone
    noisepolicy-train --reward http://127.0.0.1:8000 ...         # here

It trusts its callers, so keep it on this machine; docs/rewards.md has the protocol.
"""

import base64
import io
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

from PIL import Image


def score(image: Image.Image, prompt: str) -> float:
    """Score an RGB image; higher is better. Replace this by a detector, a VLM judge, ..."""
    return image.resize((1, 1)).convert("L").getpixel((0, 0)) / 255


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        images = [Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB") for png in request["images"]]
        rewards = [score(image, prompt) for image, prompt in zip(images, request["prompts"], strict=True)]
        answer = json.dumps({"rewards": rewards}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)


if __name__ == "__main__":
    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
