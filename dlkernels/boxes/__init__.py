"""What surrounds label assignment in a detector.

* ``ops.box_iou_loss`` and ``ops.sigmoid_focal_loss``: fused losses (``op``, ``triton``);
* ``ops.max_iou_assign``, ``ops.yolo_assign`` and ``ops.fcos_assign``: assigners (``assign``);
* ``anchors``: anchors on regular grids;
* ``coding``: box encodings (deltas, distances, YOLO) and the centerness of FCOS;
* ``kmeans``: sizes of YOLO anchors from the sizes of boxes.

Boxes are x1, y1, x2, y2 in pixels everywhere.
"""
