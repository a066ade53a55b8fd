# DAE-Former in mmsegmentation: pictures/train/images/*.png beside pictures/train/masks/*.png of 0, 1, …; val the same.
# ruff: noqa: C408 (mmseg's configs are written so)
default_scope = "mmseg"
custom_imports = dict(imports=["attn_medseg.mmseg"], allow_failed_imports=False)
work_dir = "runs/mmseg"
meta = dict(classes=("background", "structure"), palette=[[0, 0, 0], [255, 200, 0]])
channels = [32, 80, 128]
backbone = dict(type="DAEFormerBackbone", channels=channels)
head = dict(type="DAEFormerHead", in_channels=channels, num_classes=2, dropout_ratio=0.0)
scaled = dict(type="SegDataPreProcessor", mean=[127.5] * 3, std=[64.0] * 3, bgr_to_rgb=True)
scaled.update(size_divisor=16, test_cfg=dict(size_divisor=16))
model = dict(type="EncoderDecoder", data_preprocessor=scaled, backbone=backbone, decode_head=head)
model.update(test_cfg=dict(mode="whole"))

test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
folder = dict(type="BaseSegDataset", data_root="pictures", metainfo=meta, pipeline=test_pipeline)
folder.update(img_suffix=".png", seg_map_suffix=".png")
train = dict(folder, data_prefix=dict(img_path="train/images", seg_map_path="train/masks"))
val = dict(folder, data_prefix=dict(img_path="val/images", seg_map_path="val/masks"))
train_dataloader = dict(batch_size=4, sampler=dict(type="InfiniteSampler"), dataset=train)
val_dataloader = dict(batch_size=1, sampler=dict(type="DefaultSampler", shuffle=False), dataset=val)
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU", "mDice"])
optim_wrapper = dict(optimizer=dict(type="AdamW", lr=1e-3, weight_decay=1e-4), clip_grad=dict(max_norm=12.0))
param_scheduler = [dict(type="CosineAnnealingLR", by_epoch=False, T_max=2000)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=2000, val_interval=500)
val_cfg = dict()
default_hooks = dict(checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=500))
default_hooks.update(logger=dict(type="LoggerHook", log_metric_by_epoch=False))
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
