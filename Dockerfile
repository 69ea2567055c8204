# docker build -t xverse .
# docker run --rm --stop-timeout 620 -p 127.0.0.1:36000:36000 -e XVERSE_API_KEY=secret -v xverse-cache:/home/xverse/.cache xverse
# docker run --rm --stop-timeout 620 -p 127.0.0.1:36000:36000 -e XVERSE_API_KEY=secret -v /path/to/model:/model:ro xverse --model /model --quantize int4
#
# --stop-timeout: on SIGTERM the server finishes running replies, which takes up to --timeout (600 s); Docker kills it
# after 10 s otherwise. The volume keeps models of a hub, which every new container would download again.

FROM python:3.11-slim AS build
RUN apt-get update -q && apt-get install -q -y --no-install-recommends g++
WORKDIR /src
COPY . /src
RUN pip wheel --quiet --no-deps --wheel-dir /dist /src

FROM python:3.11-slim
# CPU build of PyTorch. For an NVIDIA GPU, build with --build-arg TORCH=torch --build-arg TORCH_INDEX=
ARG TORCH=torch==2.13.0+cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN pip install --quiet --no-cache-dir --no-deps ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} "$TORCH"
COPY --from=build /dist /dist
RUN pip install --quiet --no-cache-dir "$(echo /dist/xverse_lm-*.whl)[serve]"
RUN useradd --create-home xverse && install -d -o xverse -g xverse /home/xverse/.cache
USER xverse
VOLUME /home/xverse/.cache
EXPOSE 36000
STOPSIGNAL SIGTERM
HEALTHCHECK --start-period=300s CMD ["python", "-m", "xverse.commands.health"]
ENTRYPOINT ["xverse", "serve", "--host", "0.0.0.0"]
