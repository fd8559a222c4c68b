"""What this tool finds, in the forms that other tools read: detections, data sets, head lists, the hub, pipelines."""
