# CPU only: docker build -t localization-heads . && docker run --rm -v "$PWD/outputs:/results/outputs" localization-heads
FROM python:3.12-slim

RUN useradd --create-home user && mkdir /results && chown user /results
WORKDIR /opt/localization-heads
COPY pyproject.toml requirements.txt README.md LICENSE NOTICE.md ./
COPY localization_heads localization_heads
COPY examples examples
RUN pip install --no-cache-dir -r requirements.txt
USER user
WORKDIR /results
ENTRYPOINT ["locheads"]
