"""Track a target with onnxruntime and numpy: `python examples/onnx_track.py MODEL CLIP X,Y,W,H > boxes.csv`.

MODEL: the folder that `dmv-fast export --onnx MODEL` wrote; CLIP: a video, or images as `img/%06d.jpg`. It
does what FastDMVTracker does, by the rules of dmv.json; only that it waits for a lost target where it was
last seen, and does not search around. OpenCV only decodes the frames and resizes the crop.
"""

import json
import sys

import cv2
import numpy as np
import onnxruntime


class OnnxTracker:
    def __init__(self, folder, **options):
        load = onnxruntime.InferenceSession
        self.graph = {
            name: load(f"{folder}/{name}.onnx", **options) for name in ("backbone", "read", "write")
        }
        with open(f"{folder}/dmv.json") as file:
            rule = json.load(file)
        self.crop, self.use = rule["crop"]["size"], rule["tracker"]
        wh, cells = np.array(rule["anchors"]["sizes"])[:, None, None], rule["shapes"]["W"]  # (A, 1, 1, 2)
        row, column = np.indices((cells, cells)) * rule["anchors"]["step"]
        self.centre, self.wh = np.broadcast_arrays(
            np.stack([column, row], -1), wh
        )  # of anchors: (A, H, W, 2)
        profile = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(cells) / cells)
        self.window = np.outer(profile, profile)

    def init(self, image, box):
        self.box, self.memory, self.frame, self.written, self.lost = np.array(box, float), [], 0, 0, False
        features, origin, zoom = self.look(image)
        corner, wh = (self.box[:2] - origin) / zoom, self.box[2:] / zoom
        low = np.maximum(corner, self.centre - self.wh / 2)
        common = (np.minimum(corner + wh, self.centre + self.wh / 2) - low).clip(0).prod(-1)
        scores = np.zeros_like(common)  # 1 at the anchor that overlaps the target most
        scores.flat[np.argmax(common / (wh.prod() + self.wh.prod(-1) - common))] = 1
        deltas = np.concatenate([(corner + wh / 2 - self.centre) / self.wh, np.log(wh / self.wh)], -1)
        self.remember(features, scores[None], np.moveaxis(deltas, -1, 1)[None])

    def track(self, image):
        features, origin, zoom = self.look(image)
        keys, values = (np.concatenate(parts, 1) for parts in zip(*self.memory, strict=True))
        valid = np.array([keys.shape[1]], np.int32)
        memory = {"keys": keys, "values": values, "valid": valid}
        scores, deltas, boxes = self.graph["read"].run(None, {"features": features, **memory})
        box, score = self.pick(scores[0], boxes[0], self.box[2:] / zoom)
        found = score >= self.use["refound_score" if self.lost else "found_score"]
        self.frame, self.lost = self.frame + 1, not found
        if found:  # the centre stays in the frame, the size between 2 pixels and the frame's
            limit = np.array(image.shape[1::-1])
            size = (box[2:] * zoom).clip(2, limit)
            self.box = np.append(((box[:2] + box[2:] / 2) * zoom + origin).clip(0, limit) - size / 2, size)
        policy = self.use["policy"]
        if found and self.frame - self.written >= policy["interval"] and score >= policy["threshold"]:
            self.remember(features, scores, deltas)
            self.written = self.frame
        return self.box, score, found

    def look(self, image):
        """The search crop's features, its corner in the frame, and frame pixels a crop pixel."""
        (w, h), (height, width) = self.box[2:], image.shape[:2]
        side = max(4, round(2 * np.sqrt((w + (w + h) / 2) * (h + (w + h) / 2))))
        x0, y0 = np.round(self.box[:2] + self.box[2:] / 2 - side / 2).astype(int)
        patch = np.empty((side, side, 3), np.uint8)
        patch[:] = image[:: max(1, height // 100), :: max(1, width // 100)].mean((0, 1)).round()
        inside = image[max(y0, 0) : max(y0 + side, 0), max(x0, 0) : max(x0 + side, 0)]
        patch[max(-y0, 0) :, max(-x0, 0) :][: inside.shape[0], : inside.shape[1]] = inside
        method = cv2.INTER_AREA if side > self.crop else cv2.INTER_LINEAR
        crop = cv2.resize(patch, (self.crop, self.crop), interpolation=method)
        (features,) = self.graph["backbone"].run(None, {"crops": crop[None]})
        return features, np.array([x0, y0]), side / self.crop

    def pick(self, scores, boxes, last):
        """The best box, after a penalty on changes of size and a cosine window; its size moves smoothly."""
        (w, h), (last_w, last_h), use = np.moveaxis(boxes[..., 2:], -1, 0), last, self.use["pick"]
        scale = np.sqrt((3 * w + h) * (3 * h + w) / (3 * last_w + last_h) / (3 * last_h + last_w))
        ratio = w / h / (last_w / last_h)
        change = np.maximum(scale, 1 / scale) * np.maximum(ratio, 1 / ratio)
        penalty = np.exp((1 - change) * use["size_penalty"])
        best = np.argmax(scores * penalty * (1 - use["window"]) + self.window * use["window"])
        score, box = float(scores.flat[best]), boxes.reshape(-1, 4)[best]
        rate = 1 if use["smoothing"] >= 1 else penalty.flat[best] * score * use["smoothing"]
        size = last + (box[2:] - last) * rate
        return np.append(box[:2] + (box[2:] - size) / 2, size), score

    def remember(self, features, scores, deltas):
        """One frame more in the memory; beyond the capacity the oldest goes, never the first."""
        if len(self.memory) == self.use["capacity"]:
            del self.memory[1:2]
        if len(self.memory) < self.use["capacity"]:
            soft = {"scores": scores.astype(np.float32), "deltas": deltas.astype(np.float32)}
            self.memory.append(self.graph["write"].run(None, {"features": features, **soft}))


def main(model, clip, box):
    tracker, capture, number = OnnxTracker(model), cv2.VideoCapture(clip), 0
    answer = [float(v) for v in box.split(",")], 1.0, True
    print("frame,x,y,w,h,score,found")
    while (frame := capture.read()) and frame[0]:
        answer = tracker.track(frame[1]) if number else (tracker.init(frame[1], answer[0]), answer)[1]
        print(number, *(f"{v:.3f}" for v in answer[0]), f"{answer[1]:.4f}", int(answer[2]), sep=",")
        number += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
