-- Kinds of false detections per bin of training instances: duplicate, poor box, wrong class, background, other.
-- views: matches, results
-- options: bins, cap
--
-- Of the detections that are judged and among the best `cap` (300) of their image; per true one, so that bins can be
-- compared.
WITH binned AS (
    SELECT
        m.run,
        m.kind,
        CASE WHEN r.instance_count IS NOT NULL THEN 1 + len(list_filter(
            string_split(coalesce(getvariable('bins'), '10,100,1000'), ',')::BIGINT[],
            lambda edge: r.instance_count >= edge
        )) END AS bin
    FROM matches AS m
    JOIN results AS r ON r.run = m.run AND r.category_id = m.category_id
    WHERE m.kind NOT IN ('unjudged', 'ignored') AND m.rank <= coalesce(getvariable('cap')::BIGINT, 300)
)
SELECT
    run,
    bin,
    count(*) FILTER (kind = 'true') AS n_true,
    count(*) FILTER (kind != 'true') AS n_false,
    count(*) FILTER (kind = 'duplicate') / nullif(count(*) FILTER (kind = 'true'), 0) AS duplicate,
    count(*) FILTER (kind = 'poor_box') / nullif(count(*) FILTER (kind = 'true'), 0) AS poor_box,
    count(*) FILTER (kind = 'wrong_class') / nullif(count(*) FILTER (kind = 'true'), 0) AS wrong_class,
    count(*) FILTER (kind = 'background') / nullif(count(*) FILTER (kind = 'true'), 0) AS background,
    count(*) FILTER (kind = 'other') / nullif(count(*) FILTER (kind = 'true'), 0) AS other
FROM binned
GROUP BY run, bin
ORDER BY run, bin;
