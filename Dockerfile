# Training and serving. Torch brings its own CUDA: the host needs NVIDIA's driver and container toolkit, or runs on CPU.
#   docker build --target train --tag hi-end-mae .
#   docker run --rm --gpus all --shm-size 8g -v /data:/data -w /opt/hi-end-mae/hi_end_mae_pretrain hi-end-mae \
#       run --config_file configs/train.json --dataset_dir /data/CT --ckpt_dir /data/encoder --output_dir /data/curves
#   docker run --rm --gpus all --shm-size 8g -v /data:/data -w /opt/hi-end-mae/hi_end_mae_btcv_seg hi-end-mae \
#       run --config_file configs/train.json --dataset_dir /data/BTCV --pretrained_encoder /data/encoder/model.pt \
#       --ckpt_dir /data/models --output_dir /data/outputs
#   docker build --target serve --tag hi-end-mae-label .
#   docker run --rm --gpus all --shm-size 8g -p 127.0.0.1:8000:8000 -v /data/studies:/studies -v label:/home/monai \
#       hi-end-mae-label
# Both run as user 1000, who must be allowed to write to the folders that are mounted. The server has the small weights.
# What it trains stays in the volume `label`, with its bundles: a newer image needs another volume.
FROM python:3.11.13-slim-bookworm AS base
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PYTHONUNBUFFERED=1
RUN useradd --create-home --uid 1000 monai
WORKDIR /opt/hi-end-mae

FROM base AS train
COPY constraints.txt pyproject.toml ./
# The dependencies alone, so that another source leaves this layer as it is.
RUN python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
    print(*project['dependencies'], *project['optional-dependencies']['dicom'], sep='\n')" > requirements.txt \
    && pip install --constraint constraints.txt --requirement requirements.txt
COPY README.md LICENSE ./
COPY shared_networks shared_networks
RUN pip install --no-deps --editable .
COPY --chown=1000 hi_end_mae_pretrain hi_end_mae_pretrain
COPY --chown=1000 hi_end_mae_btcv_seg hi_end_mae_btcv_seg
COPY --chown=1000 hi_end_mae_flare_seg hi_end_mae_flare_seg
USER 1000
ENTRYPOINT ["python", "-m", "monai.bundle"]
CMD ["--help"]

FROM train AS releases
COPY docs docs
RUN python -m shared_networks.bundle.release --output_dir /tmp/releases --overlay small

FROM base AS serve
COPY shared_networks/bundle/monai_label/requirements.txt ./
RUN pip install --requirement requirements.txt
COPY shared_networks/bundle/monai_label/serve.py ./
COPY --from=releases /tmp/releases/hi_end_mae_btcv_seg_v*.zip hi_end_mae_btcv_seg.zip
COPY --from=releases /tmp/releases/hi_end_mae_flare_seg_v*.zip hi_end_mae_flare_seg.zip
USER 1000
EXPOSE 8000
ENTRYPOINT ["python", "serve.py", "--app", "/home/monai/app", "--studies", "/studies", \
    "hi_end_mae_btcv_seg.zip", "hi_end_mae_flare_seg.zip"]
CMD ["--host", "0.0.0.0", "--port", "8000"]
