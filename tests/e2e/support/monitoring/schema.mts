// Grafana's published types of dashboards and panels (@grafana/schema) and of Prometheus queries (its foundation SDK), adapted to JSON.
// A literal that is assigned to Dashboard must have all required fields, no unknown fields, and valid values.
import type { AnnotationQuery as AnyAnnotationQuery, Dashboard as AnyDashboard, FieldConfig, FieldConfigSource, Panel as AnyPanel, RowPanel } from "@grafana/schema";
import type * as heatmap from "@grafana/schema/dist/esm/raw/composable/heatmap/panelcfg/x/HeatmapPanelCfg_types.gen";
import type * as stat from "@grafana/schema/dist/esm/raw/composable/stat/panelcfg/x/StatPanelCfg_types.gen";
import type * as table from "@grafana/schema/dist/esm/raw/composable/table/panelcfg/x/TablePanelCfg_types.gen";
import type * as timeseries from "@grafana/schema/dist/esm/raw/composable/timeseries/panelcfg/x/TimeSeriesPanelCfg_types.gen";
import type { Dataquery } from "@grafana/grafana-foundation-sdk/prometheus";

// JSON contains the values of an enumeration, not their names.
type Json<T> = unknown extends T ? T
  : T extends string ? `${T}`
  : T extends number ? `${T}` extends `${infer N extends number}` ? N : never
  : T extends (infer Item)[] ? Json<Item>[]
  : T extends object ? { [Key in keyof T]: Json<T[Key]> }
  : T;

type Replace<T, Fields> = Omit<T, keyof Fields> & Fields;

type Query = Required<Pick<Dataquery, "datasource" | "expr" | "refId">> & Omit<Dataquery, "_implementsDataqueryVariant">;

// The published type of a panel does not define the options of each kind.
type Panel<Kind, Options, Custom = never> = Replace<AnyPanel, {
  type: Kind;
  id: number;
  title: string;
  options: Options;
  targets: Query[];
  fieldConfig: Replace<FieldConfigSource, { defaults: Replace<FieldConfig, { custom?: Custom }> }>;
}>;

// The data source reads the query and its display formats from these fields; since Grafana 12 it moves the first two to `target`.
type AnnotationQuery = AnyAnnotationQuery & { expr?: string; step?: string; titleFormat?: string; textFormat?: string };

export type Dashboard = Json<Replace<AnyDashboard, {
  uid: string;
  title: string;
  annotations: { list: AnnotationQuery[] };
  panels: (
    | RowPanel
    | Panel<"stat", stat.Options>
    | Panel<"timeseries", timeseries.Options, timeseries.FieldConfig>
    | Panel<"heatmap", heatmap.Options, heatmap.FieldConfig>
    | Panel<"table", table.Options, table.FieldConfig>
  )[];
}>>;
