"""What users bring: samples as JSON lines, images, masks, phrases and network addresses. All untrusted."""
