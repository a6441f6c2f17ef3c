"""Track a target with onnxruntime and numpy: `python examples/onnx_track.py MODEL CLIP X,Y,W,H > boxes.csv`.

MODEL is the folder of `dmv-fast export --onnx MODEL`; OpenCV only reads the video and cuts the crop. A lost
target is waited for where it was last seen.
"""

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime


class OnnxTracker:
    def __init__(self, folder, **options):
        graphs = (f"{folder}/{name}.onnx" for name in ("backbone", "first", "read", "write"))
        sessions = (onnxruntime.InferenceSession(graph, **options) for graph in graphs)
        self.backbone, self.first, self.read, self.write = sessions
        self.rule = json.loads(Path(folder, "dmv.json").read_text())["tracker"]

    def init(self, image, box):
        self.box, self.memory, self.frame, self.found = np.array(box, float), [], 0, True
        features, corner, zoom = self.look(image)
        box = np.append(self.box[:2] - corner, self.box[2:]) / zoom
        self.remember(features, *self.first.run(None, {"box": np.float32([box])}))

    def track(self, image):
        features, corner, zoom = self.look(image)
        keys, values = (np.concatenate(part, axis=1) for part in zip(*self.memory, strict=True))
        memory = {"keys": keys, "values": values, "valid": np.int32([keys.shape[1]])}
        last = {"size": np.float32([self.box[2:] / zoom])}
        (box,), (score,), *maps, _ = self.read.run(None, {"features": features, **memory, **last})
        self.frame += 1
        self.found = score >= self.rule["found_score" if self.found else "refound_score"]
        if self.found:  # the centre stays in the frame, the size between 2 pixels and the frame's
            limit = image.shape[1::-1]
            size = (box[2:] * zoom).clip(2, limit)
            self.box = np.append(((box[:2] + box[2:] / 2) * zoom + corner).clip(0, limit) - size / 2, size)
            policy = self.rule["policy"]
            if self.frame - self.written >= policy["interval"] and score >= policy["threshold"]:
                self.remember(features, *maps)
        return self.box, score, self.found

    def look(self, image):
        """-> the search crop's features, its corner in the frame, frame pixels to a pixel of the crop."""
        (w, h), (rows, columns) = self.box[2:], image.shape[:2]
        size = max(4, 2 * np.sqrt((w + (w + h) / 2) * (h + (w + h) / 2)))
        side = round(2 ** (round(16 * np.log2(size)) / 16))
        step = max(1, round(side / 64))
        x, y = corner = np.round((self.box[:2] + self.box[2:] / 2 - side / 2) / step) * step
        mean = image[:: max(1, rows // 100), :: max(1, columns // 100)].mean((0, 1)).round()
        shift = np.float64([[1, 0, -x], [0, 1, -y]])
        patch = cv2.warpAffine(image, shift, (side, side), flags=cv2.INTER_NEAREST, borderValue=mean)
        crop = cv2.resize(patch, (256, 256), interpolation=cv2.INTER_AREA if side > 256 else cv2.INTER_LINEAR)
        return self.backbone.run(None, {"crops": crop[None]})[0], corner, side / 256

    def remember(self, features, scores, deltas):
        given = {"features": features, "scores": scores, "deltas": deltas}
        self.memory.append(self.write.run(None, given))
        if len(self.memory) > self.rule["capacity"]:
            del self.memory[1]  # the oldest goes, never the first
        self.written = self.frame


if __name__ == "__main__":
    model, clip, box = sys.argv[1:]
    tracker, capture = OnnxTracker(model), cv2.VideoCapture(clip)
    tracker.init(capture.read()[1], [float(v) for v in box.split(",")])
    print(f"frame,x,y,w,h,score,found\n0,{box},1,1")
    while (image := capture.read()[1]) is not None:
        box, score, found = tracker.track(image)
        print(tracker.frame, *box.round(3), f"{score:.4f}", int(found), sep=",")
